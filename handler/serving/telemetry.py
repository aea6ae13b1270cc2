"""The side work for each batch, besides its answers: response headers, metrics, records, the monitor.

A failure of one kind of side work does not affect the other kinds: the monitor must continue even if a header cannot be
set. No failure may affect an answer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from early_exit.handler.backbone.scores import predicts
from early_exit.handler.errors import RecordError
from early_exit.handler.exits.switch import ON, Position
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.monitor.blocks import Sample
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor
from early_exit.handler.protocol import EXPLAIN_HEADER
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.serving.isolation import Served
from early_exit.handler.serving.metrics import ServingMetrics
from early_exit.handler.serving.ownership import RowOwnership, Unknown
from early_exit.handler.serving.shadow_items import Sampling, ShadowItems, ShadowSample

logger = logging.getLogger(__name__)

SideWork = Callable[[Served], None]
"""Does side work for one call of the user's handler."""


class Telemetry:
    """Runs every kind of side work for each call of the user's handler, and counts the failures of each kind."""

    def __init__(self, metrics: ServingMetrics, work: dict[str, SideWork]) -> None:
        """Take the side work.

        Args:
            metrics: counts failures.
            work: the side work by kind, in the order in which it is done.
        """
        self._metrics, self._work = metrics, work
        self._failing: set[str] = set()
        """The kinds that failed the last time; they are not logged again."""
        for kind in work:
            metrics.side_errors(kind, 0)  # a rate needs a first value

    def note(self, served: Served) -> None:
        """Do all side work for one call of the user's handler; this never raises."""
        for kind, work in self._work.items():
            try:
                work(served)
                self._failing.discard(kind)
            except Exception:
                self._failed(kind)

    def _failed(self, kind: str) -> None:
        if kind not in self._failing:
            logger.exception("the side work '%s' failed; answers and all other side work continue", kind)
        self._failing.add(kind)
        with contextlib.suppress(Exception):  # the failure may be that of the metrics
            self._metrics.side_errors(kind, 1)


class Monitoring:
    """Feeds the losses of drawn requests to the monitor, and sets the model to the monitor's fallback level."""

    def __init__(self, model: EarlyExitModel, monitor: SharedMonitor, sampling: Sampling) -> None:
        self._model, self._monitor, self._sampling = model, monitor, sampling
        model.fall_back(monitor.state.step)

    def note(self, served: Served) -> None:
        """Feed the drawn requests of one call of the handler. The monitor's level applies from the next batch on."""
        sample = self._sampling.of(served)
        for part in sample.watched:
            self._monitor.note(self._samples(part, sample))
        if (level := self._monitor.state.step) != self._model.level:
            self._model.fall_back(level)

    def _samples(self, part: ShadowItems, sample: ShadowSample) -> list[Sample]:
        try:
            contents = sample.contents(part, self._sampling.key)
        except (OSError, RecordError):  # `Recording` reports it; a sample of unknown content counts as a new content
            contents = [UNKNOWN_CONTENT] * len(part.places)
        batch, answers = part.batch, part.batch.answers
        scores = self._model.assembly.description.scores
        outputs, reference = answers.outputs[part.at(answers.shadow)], part.at(answers.reference)
        monitored = self._monitor.monitored
        losses = monitored.losses(outputs, reference, scores)
        components = monitored.components(reference, scores)
        # The certificate is about requests for which the backbone predicts a class.
        return [Sample(batch.level, loss, None if content == UNKNOWN_CONTENT else content, batch.time, 1 / rate, state)
                for loss, content, rate, state, counts in zip(losses, contents, part.sampling_rate, components,
                                                              predicts(reference).tolist()) if counts]


class Reporting:
    """Reports requests, records and the monitor's state as metrics."""

    def __init__(self, model: EarlyExitModel, metrics: ServingMetrics, writer: RecordWriter | None,
                 monitor: SharedMonitor | None, ownership: RowOwnership) -> None:
        self._model, self._metrics, self._writer, self._monitor = model, metrics, writer, monitor
        self._ownership, self._unknown = ownership, set[Unknown]()
        self._all_reach_the_model = True
        self._state: MonitorState | None = None
        self._position = ON
        metrics.switched(ON)
        self._turned(model.switch.read())

    def note(self, served: Served) -> None:
        """Report the changes by one call of the user's handler."""
        self._metrics.served(served)
        self._metrics.bypassed(self._model.bypass.bypassed())
        for batch in served.batches:
            self._turned(batch.switch)
        if self._writer is not None:
            self._metrics.records(*self._writer.take_counts())
            self._metrics.not_finite(self._writer.take_not_finite())
        if self._all_reach_the_model and _answers_without_the_model(served):
            self._all_reach_the_model = False
            logger.warning("a request was answered without a call of the model, such as from a cache of the handler: "
                           "such requests are in no record, so certificate and monitor are only about the others")
        for how in self._ownership.unknown - self._unknown:
            self._metrics.rows_unknown(how.value)
            self._unknown.add(how)
        if self._monitor is not None and (state := self._monitor.state) is not self._state:
            self._metrics.monitor(state)
            self._state = state

    def _turned(self, position: Position) -> None:
        if position != self._position:
            self._position = position
            self._metrics.switched(position)
            logger.warning("the operator's switch of the exits is now: %s%s", position,
                           f", because it cannot be read: {trouble}" if (trouble := self._model.switch.trouble) else "")


def _answers_without_the_model(served: Served) -> bool:
    """Tell whether fewer rows reached the model than requests were answered; explanations have no rows."""
    answered = [reply for call, reply in zip(served.calls, served.replies)
                if reply.status == 200 and not call.has_header(EXPLAIN_HEADER)]
    return sum(len(batch.answers.outputs) for batch in served.batches) < len(answered)
