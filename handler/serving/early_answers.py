"""Answers that are sent as soon as they are ready: each request waits in its own call of the user's handler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from early_exit.handler.call import Call, Reply, share_instances
from early_exit.handler.inference.bypassing import EpochBypass
from early_exit.handler.inference.continuous import ContinuousExecutor
from early_exit.handler.inference.coroutine import Coroutine
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.serving.isolation import Served, answer_calls
from early_exit.handler.serving.telemetry import Telemetry
from early_exit.handler.user_handler.attributes import HandlerAttributes
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.entry_point import UserHandler


class EarlyAnswers:
    """The requests of one worker that are being answered, one stage of the model at each step."""

    def __init__(self, model: EarlyExitModel, handler: UserHandler, context: HandlerContext,
                 telemetry: Telemetry) -> None:
        """Begin without requests.

        Args:
            model: a model whose executor is a `ContinuousExecutor` and whose bypass is an `EpochBypass`.
            handler: the user's handler.
            context: the handler's context.
            telemetry: is told everything that is served.
        """
        executor, bypass = model.executor, model.bypass
        if not isinstance(executor, ContinuousExecutor) or not isinstance(bypass, EpochBypass):
            raise TypeError(f"early answers need a continuous executor, found {type(executor).__name__}")
        self._executor, self._bypass = executor, bypass
        self._model, self._handler, self._context, self._telemetry = model, handler, context, telemetry
        self._attributes = HandlerAttributes(handler, context)
        executor.waiting = self._attributes.waiting
        self._in_flight: dict[str, Coroutine] = {}
        """The coroutine of each call that has not been answered, by the id of the call."""

    def step(self, calls: Sequence[Call]) -> list[Reply | None]:
        """Add new calls, run one stage, and return for each call its reply, or None if it has none yet.

        Earlier calls that are missing from `calls` are dropped.
        """
        if share_instances(calls):
            return self._at_once(calls)
        started = time.perf_counter()
        for gone in self._in_flight.keys() - {call.id for call in calls}:
            self._executor.drop(self._in_flight.pop(gone))
        for call in calls:
            if call.id not in self._in_flight:
                self._in_flight[call.id] = self._executor.start(partial(self._handle, call))
        self._executor.run_stage()
        replies = [self._leave(call.id) for call in calls]
        if self._model.takes_exits:
            n_answered = sum(reply is not None for reply in replies)
            self._bypass.ran(n_answered, time.perf_counter() - started)
        return replies

    def _at_once(self, calls: Sequence[Call]) -> list[Reply | None]:
        """Answer all requests at once, because the first of them holds the instances of all requests."""
        [served] = answer_calls(calls, self._handler, self._context, self._model, None, alone=False)
        self._telemetry.note(served)
        return [*served.replies]

    def _handle(self, call: Call) -> Served:
        with self._attributes.call():
            [served] = answer_calls([call], self._handler, self._context, self._model, alone=False)
        return served

    def _leave(self, call_id: str) -> Reply | None:
        coroutine = self._in_flight[call_id]
        if not coroutine.done:
            return None
        del self._in_flight[call_id]
        served: Served = coroutine.result()
        self._telemetry.note(served)
        return served.replies[0]
