"""The headers that tell a client at which exit its request left and, in the anytime mode, what every exit predicted."""

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
    """The facts about one row of the model's input that the headers are made from."""

    stage: int
    """The stage after which the row was answered, or `FULL`."""
    confidence: float
    level: int
    """The fallback level that answered."""
    per_exit: str | None
    """The prediction of every exit, as JSON, or None if the request did not ask for it."""


class ResponseHeaders:
    """Sets the headers of replies."""

    def __init__(self, model: EarlyExitModel, version: str, labels: Any = None) -> None:
        """Take the sources of the headers.

        Args:
            model: the model that answers.
            version: the version of the archive.
            labels: the user's handler's `mapping` from class numbers to names, if it has one.
        """
        self._model, self._version, self._labels = model, version, labels

    def set(self, served: Served) -> None:
        """Set the headers of replies, if it is known which rows belong to which request.

        For a request of several rows, the exit is that of the row that left last, and the confidence is the lowest of
        all rows. The predictions of the exits are also those of the row with the lowest confidence. The position of the
        operator's switch is set even if the owners of the rows are not known.
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
        # The header names the monitor's level. A control batch, or a batch that the operator's switch affects, has a
        # higher level. A call in flight keeps its level when the monitor goes to a higher one. The minimum is right in
        # both cases.
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
    """Return the predictions of every exit for each request that asked for them, as JSON of about 60 bytes per exit.

    The JSON is a list of {"exit", "class", "confidence"}, with "label" if the handler has names for the classes. The
    list is in the order of the exits, and the whole backbone is last.

    Args:
        exits: names of the exits, in order.
        scores: for each exit, the (A, K) scores of the A requests.
        kind: the kind of the scores.
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
