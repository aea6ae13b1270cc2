"""The executor of early answers: each call of the model waits in a coroutine, and rows of all calls run together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.inference.at_once import AtOnceExecutor
from early_exit.handler.inference.coroutine import Coroutine, Coroutines
from early_exit.handler.inference.executor import Execution, Record
from early_exit.handler.inference.forward import Live, Stage
from early_exit.handler.inference.in_flight import InFlightCall, InFlightCalls


class ContinuousExecutor:
    """Runs each call together with those of other coroutines, one stage at a time; an `Executor`.

    A call from outside the coroutines of this executor, such as the probe, runs at once.
    """

    def __init__(self, levels: Sequence[Sequence[Stage]], record: Record | None = None) -> None:
        """Take the stages.

        Args:
            levels: the stages at each fallback level; the levels differ in their exits alone.
            record: computes what is recorded of an activation; with None, nothing is recorded.
        """
        self._at_once = AtOnceExecutor(levels, record)
        self.calls = InFlightCalls(levels, record)
        """The calls that wait; they continue in the order in which a stage returns them."""
        self._coroutines = Coroutines()
        self._waiting: dict[InFlightCall, Coroutine] = {}
        self.waiting: Callable[[], AbstractContextManager[object]] = nullcontext
        """A context that a call enters, in its thread, while it waits for others."""
        self._computing = threading.Lock()
        """Held while a stage runs, because a handler may also call the model in threads of its own."""

    def prepare(self, inputs: Live, batch_size: int) -> None:
        """Do nothing: stages run as they are."""

    def run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        coroutine = self._coroutines.current()
        if coroutine is None or not len(shadow):
            with self._computing:
                return self._at_once.run(inputs, level, shadow, anytime)
        # While the call waits, the handler may fill the same tensors with the next request. A stage may write into its
        # input, which torch forbids if the input was created in inference mode.
        with torch.inference_mode(False):
            own = tuple(x.clone() for x in inputs)
        with self.waiting():
            call: InFlightCall = coroutine.ask((own, shadow, anytime, level))
        return Execution(call.answers(), call.activations(), call.level)

    def start(self, function: Callable[[], Any]) -> Coroutine:
        """Run a function until its first call of the model waits, or until it ends."""
        coroutine = self._coroutines.start(function)
        self._enter(coroutine)
        return coroutine

    def run_stage(self) -> None:
        """Run one stage, and resume the functions whose calls have ended with it."""
        with self._computing:
            ended = self.calls.run_stage()
        for call in ended:
            coroutine = self._waiting.pop(call)
            coroutine.resume(call)
            self._enter(coroutine)

    def drop(self, coroutine: Coroutine) -> None:
        """End a function that nobody waits for any more, and drop its call."""
        for call in [call for call, waiting in self._waiting.items() if waiting is coroutine]:
            del self._waiting[call]
            self.calls.drop(call)
        coroutine.drop()

    def _enter(self, coroutine: Coroutine) -> None:
        """Add the call at which a function has stopped, if the function has not ended."""
        if not coroutine.done:
            self._waiting[self.calls.enter(*coroutine.asked)] = coroutine
