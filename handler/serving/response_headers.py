"""The headers that tell a client where its answer left, and in the anytime mode what every exit would have said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.call import Reply
from early_exit.handler.exits.switch import ON
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import (
    CONFIDENCE_HEADER,
    EXIT_HEADER,
    FULL,
    OPINIONS_HEADER,
    STEP_HEADER,
    SWITCH_HEADER,
    VERSION_HEADER,
)
from early_exit.handler.serving.isolation import Served


class _Row(NamedTuple):
    """What is told of one row of the model's input."""

    stage: int
    """After which it was answered, or `FULL`."""
    confidence: float
    level: int
    """The fallback level that answered."""
    per_exit: str | None
    """What every exit would have said, where the request asked for it."""


class ResponseHeaders:
    """Sets the headers of replies."""

    def __init__(self, model: EarlyExitModel, version: str, labels: Any = None) -> None:
        """Take what the headers tell.

        Args:
            model: answered.
            version: of the archive.
            labels: the user's handler's `mapping` from class numbers to names, if it has one.
        """
        self._model, self._version, self._labels = model, version, labels

    def set(self, served: Served) -> None:
        """Set the headers of replies where it is known whose the rows are.

        A request of several rows left where the last of them left, and is as sure as the least sure of them, whose
        exits are also those that it hears of. What the operator's switch was set to is told whosever the rows are.
        """
        for batch in served.batches:
            if batch.switch != ON:
                for reply in served.replies:
                    reply.headers[SWITCH_HEADER] = str(batch.switch)
        if served.owners is None:
            return
        rows_of: list[list[_Row]] = [[] for _ in served.calls]
        for batch, owners in zip(served.batches, served.owners):
            for owner, row in zip(owners, self._rows(batch)):
                rows_of[owner].append(row)
        for reply, rows in zip(served.replies, rows_of):
            self._tell(reply, rows)

    def _rows(self, batch: ServedBatch) -> Iterator[_Row]:
        answers, assembly = batch.answers, self._model.assembly
        scores = assembly.description.scores
        confidences = scores.log_probabilities(answers.outputs.float()).exp().amax(dim=1).tolist()
        # A control batch, and one that the operator wants so, goes without exits whatever the monitor says, and a call
        # in flight keeps its level.
        level = min(batch.level, self._model.level)
        per_exit: dict[int, str] = {}
        if answers.exit_scores:
            names = [assembly.exit_name(stage) for stage in answers.exit_scores]
            predictions = per_exit_predictions(names, list(answers.exit_scores.values()), scores, self._labels)
            per_exit = dict(zip(answers.anytime.tolist(), predictions))
        for row, (stage, confidence) in enumerate(zip(answers.stages.tolist(), confidences)):
            yield _Row(stage, confidence, level, per_exit.get(row))

    def _tell(self, reply: Reply, rows: list[_Row]) -> None:
        assembly = self._model.assembly
        last = FULL if any(row.stage == FULL for row in rows) else max(row.stage for row in rows)
        least_sure = min(rows, key=lambda row: row.confidence)
        level = max(row.level for row in rows)
        reply.headers[EXIT_HEADER] = assembly.exit_name(last)
        reply.headers[CONFIDENCE_HEADER] = f"{least_sure.confidence:.4f}"
        reply.headers[VERSION_HEADER] = self._version
        if level:
            reply.headers[STEP_HEADER] = f"{level} of {assembly.last_level}"
        if least_sure.per_exit is not None:
            reply.headers[OPINIONS_HEADER] = least_sure.per_exit


def per_exit_predictions(exits: Sequence[str], scores: Sequence[Tensor], kind: ScoreKind, labels: Any) -> list[str]:
    """Return what each request that asked is told: JSON, some 60 bytes an exit.

    A list of {"exit", "class", "confidence"} in the order of the backbone, the whole backbone last, with "label" where
    the handler has names for the classes.

    Args:
        exits: names of the exits, in order.
        scores: for each exit the (A, K) scores of the A requests.
        kind: of the scores.
        labels: the handler's `mapping` from class numbers, as strings, to names; anything else is left out.
    """
    by_request = torch.stack(list(scores), dim=1).float().flatten(0, 1)  # (A * exits, K)
    confidences, classes = kind.log_probabilities(by_request).exp().max(dim=1)
    predictions = [
        {"exit": name, "class": number, **_label(labels, number), "confidence": round(confidence, 4)}
        for name, number, confidence in zip(list(exits) * len(scores[0]), classes.tolist(), confidences.tolist())]
    return [json.dumps(predictions[start:start + len(exits)], separators=(",", ":"))
            for start in range(0, len(predictions), len(exits))]


def _label(labels: Any, number: int) -> dict[str, str]:
    label = labels.get(str(number)) if isinstance(labels, Mapping) else None
    if isinstance(label, (list, tuple)) and label:  # such as ["n01440764", "tench"]
        label = label[-1]
    return {"label": label} if isinstance(label, str) else {}
