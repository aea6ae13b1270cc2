"""Answers that leave when they are ready: TorchServe's continuous batching, one stage a step.

With `continuousBatching` TorchServe calls the handler with all requests that it has not answered; those that the
handler takes out of `context.request_ids` are not answered yet and come again, with new ones, in the next call.
"""

from __future__ import annotations

import copy
import fcntl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from torch import Tensor

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import ArchiveError, ConfigError
from early_exit.handler.inference.bypass import Epochs
from early_exit.handler.inference.continuous import ContinuousRun, InFlightCall
from early_exit.handler.inference.forward import Live
from early_exit.handler.model import EarlyExitModel, ServedBatch
from early_exit.handler.serving.coroutine import SuspendedWork, Threads
from early_exit.handler.serving.isolation import Served, answer_items, context_of
from early_exit.handler.serving.telemetry import Telemetry
from early_exit.handler.user_handler.wrapper import UserHandler

UNANSWERED: Any = object()
"""Stands for the response of a request that has not been answered yet."""

SERVER_SETTINGS = {"continuousBatching": True, "minWorkers": 1, "maxWorkers": 1}
"""What early answers need in model-config.yaml. With two workers TorchServe's continuous batching deadlocks: one
waits for a request and holds the lock that the other needs to go on."""


@dataclass(frozen=True)
class _Request:
    """A request that is on its way."""

    work: SuspendedWork
    """The user's handler at work on it."""
    item: Any
    context: Any
    """As the handler sees it."""


class EarlyAnswers:
    """The requests on their way through one worker, each in a call of the user's handler of its own."""

    def __init__(self, model: EarlyExitModel, inner: UserHandler, bookkeeper: Telemetry) -> None:
        self._model, self._inner, self._bookkeeper = model, inner, bookkeeper
        self._stepwise = ContinuousRun(model.steps, model.pooled if model.records else None)
        self._threads = Threads()
        self._requests: dict[str, _Request] = {}
        self._waiting: dict[InFlightCall, SuspendedWork] = {}
        self._epochs = Epochs(model.benefit)
        model.run = self._run

    def step(self, data: list[Any], context: Any) -> list[Any]:
        """Let new requests join, run one stage, and return a response for each request or `UNANSWERED`.

        Requests that TorchServe does not send any more are forgotten.
        """
        started = time.perf_counter()
        ids = [context.get_request_id(item) for item in range(len(data))]
        for gone in self._requests.keys() - set(ids):
            self._drop(gone)
        for item, request_id in enumerate(ids):
            if request_id not in self._requests:
                self._join(request_id, data[item], context_of([item], context))
        for journey in self._stepwise.run_stage():
            work = self._waiting.pop(journey)
            work.resume(journey)
            self._wait(work)
        responses = [self._leave(request_id, item, context) for item, request_id in enumerate(ids)]
        if self._model.step != self._model.last_step:
            n_answered = sum(response is not UNANSWERED for response in responses)
            self._epochs.note(n_answered, time.perf_counter() - started)
        return responses

    def _join(self, request_id: str, item: Any, context: Any) -> None:
        def handle() -> Served:
            # A copy: what the handler notes in itself before the model belongs to this request after it.
            inner, before = copy.copy(self._inner), dict(vars(self._inner))
            [served] = answer_items([item], context, inner, self._model)
            # What it has loaded or counted in itself is there for the next.
            vars(self._inner).update({name: value for name, value in vars(inner).items()
                                      if name not in before or before[name] is not value})
            return served

        work = self._threads.start(handle)
        self._requests[request_id] = _Request(work, item, context)
        self._wait(work)

    def _wait(self, work: SuspendedWork) -> None:
        """Send a call of the model on its way, if the work has stopped at one."""
        if not work.done:
            self._waiting[self._stepwise.enter(*work.asked)] = work

    def _run(self, inputs: Live, shadow: Tensor, anytime: Tensor | None) -> ServedBatch:
        """Let a call of the model travel with those of other requests; a `Runner`."""
        work, model = self._threads.current(), self._model
        if work is None or not len(shadow):
            return model.run_at_once(inputs, shadow, anytime)
        # A stage may write into its input, which torch forbids for one made in its inference mode.
        own = tuple(one.clone() if one.is_inference() else one for one in inputs)
        rate = model.sampling_rate  # the monitor may change it while the call is on its way
        step = model.step if anytime is not None or self._epochs.takes_exits else model.last_step
        journey: InFlightCall = work.ask((own, shadow, anytime, step))
        activations = {model.layers[stage]: rows for stage, rows in journey.activations().items()}
        return model.batch(inputs, journey.answers(), activations, journey.step, rate)

    def _leave(self, request_id: str, item: int, context: Any) -> Any:
        request = self._requests[request_id]
        if not request.work.done:
            return UNANSWERED
        del self._requests[request_id]
        served: Served = request.work.result()
        self._bookkeeper.note(served, [request.item], request.context)
        status, phrase = request.context.get_response_status(0)
        context.set_response_status(status, phrase, item)
        for name, value in request.context.get_response_headers(0).items():
            context.set_response_header(item, name, value)
        return served.responses[0]

    def _drop(self, request_id: str) -> None:
        work = self._requests.pop(request_id).work
        for journey in [journey for journey, waiting in self._waiting.items() if waiting is work]:
            del self._waiting[journey]
            self._stepwise.drop(journey)
        work.drop()


def require_continuous_batching(model_config: Mapping[str, Any]) -> None:
    """Check what early answers need of TorchServe.

    Raises:
        ConfigError: model-config.yaml says something else.
    """
    found = {name: model_config.get(name) for name in SERVER_SETTINGS}
    if found != SERVER_SETTINGS:
        raise ConfigError(f"early_exit.answers is 'early' in model-config.yaml, which needs {SERVER_SETTINGS} beside "
                          f"it, found {found}: build the archive with ee-archive, which sets them")


def claim_only_worker(layout: ArchiveLayout) -> TextIO:
    """Return a locked file that says that this worker serves the version; keep it open for as long as it does.

    Raises:
        ArchiveError: another worker does already.
    """
    file = layout.manifest.open()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ArchiveError("early answers need exactly one worker of a version, and one serves already: scale it "
                           "back to one worker (PUT /models/NAME?min_worker=1&max_worker=1)") from None
    return file
