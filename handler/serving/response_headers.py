"""The headers that tell a client where its answer left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from early_exit.handler.call import Reply
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import (
    CONFIDENCE_HEADER,
    EXIT_HEADER,
    FULL,
    OPINIONS_HEADER,
    STEP_HEADER,
    VERSION_HEADER,
)
from early_exit.handler.serving.anytime import per_exit_predictions
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
        exits are also those that it hears of.
        """
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
        # A control batch goes without exits whatever the monitor says, and a call in flight keeps its level.
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
