"""The headers that tell a client where its answer left."""

from __future__ import annotations

from typing import Any

from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import (
    CONFIDENCE_HEADER,
    EXIT_HEADER,
    OPINIONS_HEADER,
    STEP_HEADER,
    VERSION_HEADER,
)
from early_exit.handler.serving.anytime import per_exit_predictions
from early_exit.handler.serving.isolation import Served


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
        """Set the headers of replies whose requests became one row of the model's input each."""
        if not served.rows_are_requests:
            return
        [batch] = served.batches
        answers, assembly = batch.answers, self._model.assembly
        scores = assembly.description.scores
        confidences = scores.log_probabilities(answers.outputs.float()).exp().amax(dim=1).tolist()
        # A control batch goes without exits whatever the monitor says, and a call in flight keeps its level.
        level = min(batch.level, self._model.level)
        for reply, stage, confidence in zip(served.replies, answers.stages.tolist(), confidences):
            reply.headers[EXIT_HEADER] = assembly.exit_name(stage)
            reply.headers[CONFIDENCE_HEADER] = f"{confidence:.4f}"
            reply.headers[VERSION_HEADER] = self._version
            if level:
                reply.headers[STEP_HEADER] = f"{level} of {assembly.last_level}"
        if answers.exit_scores:
            names = [assembly.exit_name(stage) for stage in answers.exit_scores]
            predictions = per_exit_predictions(names, list(answers.exit_scores.values()), scores, self._labels)
            for row, header in zip(answers.anytime.tolist(), predictions):
                served.replies[row].headers[OPINIONS_HEADER] = header
