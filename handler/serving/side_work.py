"""Side work: what is recorded of what is served, what the monitor is told of it, and what is reported."""

from __future__ import annotations

import json
from typing import Any

import torch

from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor
from early_exit.handler.recording.format import Records, request_hash
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.serving.isolation import Served
from early_exit.handler.serving.metrics import ServingMetrics


class Recording:
    """Offers the shadow rows that were served to the writer of records."""

    def __init__(self, model: EarlyExitModel, writer: RecordWriter, *, keep_requests: bool) -> None:
        self._model, self._writer, self._keep_requests = model, writer, keep_requests

    def note(self, served: Served) -> None:
        """Record the shadow rows of requests that became one row of the model's input each."""
        if served.rows_are_requests and len(served.batches[0].answers.shadow):
            self._writer.offer(self._records(served))

    def _records(self, served: Served) -> Records:
        [batch] = served.batches
        answers, rows = batch.answers, batch.answers.shadow
        calls = [served.calls[row] for row in rows.tolist()]
        scores = self._model.assembly.description.scores
        log_probabilities = scores.log_probabilities(answers.reference.float()).cpu()
        return Records(
            activations=batch.activations,
            log_probabilities=log_probabilities.half(),
            backbone_class=log_probabilities.argmax(dim=1).int(),
            full_class=batch.full_class.int().cpu(),
            answered_class=answers.outputs[rows].argmax(dim=1).int().cpu(),
            exit=answers.stages[rows].short().cpu(),
            request=torch.tensor([request_hash(call.id) for call in calls]),
            time=torch.full((len(rows),), batch.time, dtype=torch.float64),
            sampling_rate=torch.full((len(rows),), batch.sampling_rate),
            bodies=[request_body(call.inputs) for call in calls] if self._keep_requests else None,
        )


class Monitoring:
    """Feeds the losses of shadow rows to the monitor, and lets the model fall back when it says so."""

    def __init__(self, model: EarlyExitModel, monitor: SharedMonitor) -> None:
        self._model, self._monitor = model, monitor
        model.fall_back(monitor.state.step)

    def note(self, served: Served) -> None:
        """Feed what was served; the level of the monitor's state answers from the next batch on."""
        monitored, scores = self._monitor.monitored, self._model.assembly.description.scores
        for batch in served.batches:
            answers = batch.answers
            if len(answers.shadow):
                losses = monitored.losses(answers.outputs[answers.shadow], answers.reference, scores)
                self._monitor.note(batch.level, losses)
        if (level := self._monitor.state.step) != self._model.level:
            self._model.fall_back(level)


class Reporting:
    """Reports what was served, recorded and watched as metrics."""

    def __init__(self, model: EarlyExitModel, metrics: ServingMetrics, writer: RecordWriter | None,
                 monitor: SharedMonitor | None) -> None:
        self._model, self._metrics, self._writer, self._monitor = model, metrics, writer, monitor
        self._state: MonitorState | None = None

    def note(self, served: Served) -> None:
        """Report what has changed with a call of the user's handler."""
        self._metrics.served(served)
        self._metrics.bypassed(self._model.bypass.bypassed())
        if self._writer is not None:
            self._metrics.records(*self._writer.take_counts())
        if self._monitor is not None and (state := self._monitor.state) is not self._state:
            self._metrics.monitor(state)
            self._state = state


def request_body(inputs: dict[str, Any]) -> bytes:
    """Return the bytes of a request as the handler gets it; what the host has parsed is written as JSON."""
    value = inputs.get("data", inputs.get("body", inputs))
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return value.encode() if isinstance(value, str) else json.dumps(value, default=repr).encode()
