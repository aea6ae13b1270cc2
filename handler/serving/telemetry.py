"""What happens beside the answers of a batch: response headers, metrics, records."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.inference.forward import Answers
from early_exit.handler.model import EarlyExitModel, ServedBatch
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor
from early_exit.handler.protocol import (
    CONFIDENCE_HEADER,
    EXIT_HEADER,
    FULL,
    FULL_NAME,
    OPINIONS_HEADER,
    STEP_HEADER,
    VERSION_HEADER,
)
from early_exit.handler.recording.format import Records
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.serving.anytime import opinions_headers
from early_exit.handler.serving.isolation import Served
from early_exit.handler.torchserve.metric_lines import ServingMetrics

STAGE_REPORT_S = 0.1
"""Stage times are reported for a batch at most this often: one line of output each would cost more than they tell."""

logger = logging.getLogger(__name__)


class Telemetry:
    """Reports and records what was served; nothing it does can fail an answer."""

    def __init__(self, model: EarlyExitModel, version: str, metrics: ServingMetrics, writer: RecordWriter | None,
                 *, keep_requests: bool, watchman: SharedMonitor | None = None, labels: Any = None) -> None:
        self._model, self._version, self._metrics, self._writer = model, version, metrics, writer
        self._keep_requests, self._watchman, self._labels = keep_requests, watchman, labels
        self._bypassed: dict[int, bool] = {}
        self._state: MonitorState | None = None
        if watchman is not None:
            model.step_back(watchman.state.step)
        self._failing = False
        self._stages_reported = 0.0

    def note(self, served: Served, data: list[Any], context: Any) -> None:
        """Note what one call of the user's handler served."""
        try:
            self._note(served, data, context)
            self._failing = False
        except Exception:
            if not self._failing:
                logger.exception("headers, metrics and records fail; the answers do not")
            self._failing = True

    def _note(self, served: Served, data: list[Any], context: Any) -> None:
        if served.refused:
            self._metrics.refused(len(served.items))
        for batch in served.batches:
            self._report(batch)
        # Rows belong to requests only where the handler makes one row of each request.
        if len(served.batches) == 1 and len(served.batches[0].answers.outputs) == len(served.items):
            self._set_headers(served.batches[0], served.items, context)
            self._record(served.batches[0], served.items, data, context)
        self._watch(served.batches)
        if self._writer is not None:
            self._metrics.records(*self._writer.take_counts())

    def _watch(self, batches: list[ServedBatch]) -> None:
        """Give the shadow rows' losses to the monitor, and step back when it says so."""
        bypassed = self._model.benefit.bypassed()
        for size in bypassed.keys() - {size for size, was in self._bypassed.items() if was == bypassed[size]}:
            self._metrics.bypassed(size, bypassed[size])
        self._bypassed = bypassed
        if self._watchman is None:
            return
        for batch in batches:
            answers, monitored = batch.answers, self._watchman.monitored
            if len(answers.shadow):
                self._watchman.note(batch.step, monitored.losses(answers.outputs[answers.shadow], answers.reference,
                                                                 self._model.description.scores))
        if (state := self._watchman.state) is not self._state:
            self._state = state
            self._metrics.monitor(state)
            self._model.step_back(state.step)

    def _name(self, stage: int) -> str:
        return FULL_NAME if stage == FULL else self._model.layers[stage]

    def _report(self, batch: ServedBatch) -> None:
        for stage, count in Counter(batch.answers.stages.tolist()).items():
            self._metrics.answered(self._name(stage), count)
        self._metrics.shadow_samples(len(batch.answers.shadow))
        self._metrics.anytime_answers(len(batch.answers.anytime))
        if not batch.answers.stage_seconds or batch.time - self._stages_reported < STAGE_REPORT_S:
            return
        self._stages_reported = batch.time
        for number, seconds in enumerate(batch.answers.stage_seconds):
            self._metrics.stage(self._model.layers[number] if number < len(self._model.layers) else FULL_NAME, seconds)

    def _set_headers(self, batch: ServedBatch, items: tuple[int, ...], context: Any) -> None:
        confidences = self._log_probabilities(batch.answers.outputs).exp().amax(dim=1).tolist()
        # A control batch goes without exits whatever the monitor says, and one on its way keeps the step it began with.
        step = min(batch.step, self._model.step)
        for item, stage, confidence in zip(items, batch.answers.stages.tolist(), confidences):
            context.set_response_header(item, EXIT_HEADER, self._name(stage))
            context.set_response_header(item, CONFIDENCE_HEADER, f"{confidence:.4f}")
            context.set_response_header(item, VERSION_HEADER, self._version)
            if step:
                context.set_response_header(item, STEP_HEADER, f"{step} of {len(self._model.steps) - 1}")

        self._set_opinions(batch.answers, items, context)

    def _set_opinions(self, answers: Answers, items: tuple[int, ...], context: Any) -> None:
        if not answers.opinions:
            return
        told = opinions_headers([self._name(stage) for stage in answers.opinions], list(answers.opinions.values()),
                                self._model.description.scores, self._labels)
        for row, header in zip(answers.anytime.tolist(), told):
            context.set_response_header(items[row], OPINIONS_HEADER, header)

    def _record(self, batch: ServedBatch, items: tuple[int, ...], data: list[Any], context: Any) -> None:
        answers, rows = batch.answers, batch.answers.shadow
        if self._writer is None or not len(rows):
            return
        log_probabilities = self._log_probabilities(answers.reference).cpu()
        requests = [items[row] for row in rows.tolist()]
        self._writer.offer(Records(
            activations=batch.activations,
            log_probabilities=log_probabilities.half(),
            backbone_class=log_probabilities.argmax(dim=1).int(),
            full_class=batch.full_class.int().cpu(),
            answered_class=answers.outputs[rows].argmax(dim=1).int().cpu(),
            exit=answers.stages[rows].short().cpu(),
            request=torch.tensor([request_hash(context.get_request_id(item)) for item in requests]),
            time=torch.full((len(rows),), batch.time, dtype=torch.float64),
            sampling_rate=torch.full((len(rows),), batch.sampling_rate),
            bodies=[request_body(data[item]) for item in requests] if self._keep_requests else None,
        ))

    def _log_probabilities(self, scores: Tensor) -> Tensor:
        kind: ScoreKind = self._model.description.scores
        return kind.log_probabilities(scores.float())


def request_hash(request_id: str) -> int:
    """Return a uniform signed 64-bit hash of a request id; records are split by it."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big", signed=True)


def request_body(item: dict[str, Any]) -> bytes:
    """Return the bytes of a request as TorchServe handed it over; what it has parsed is written as JSON."""
    value = item.get("data", item.get("body", item))
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return value.encode() if isinstance(value, str) else json.dumps(value, default=repr).encode()
