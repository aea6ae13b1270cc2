"""The risk of an early answer, in three measures; the user chooses which one the certificate bounds."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from early_exit.handler.backbone.scores import NO_CLASS
from early_exit.handler.errors import RecordError


class Risk(str, Enum):
    """The loss of an early answer, compared with the backbone's; training certifies it and the monitor watches it."""

    DISAGREEMENT = "disagreement"
    """The loss is 1 if the class differs from the backbone's, and 0 otherwise. It needs no labels and no
    assumptions."""
    CONFIDENCE_GAP = "confidence-gap"
    """The loss, in [0, 1], is the backbone's probability of its own class minus its probability of the answer. It
    bounds the expected drop of accuracy without labels, as long as the backbone is not under-confident."""
    ACCURACY = "accuracy"
    """The loss is 1 if only the backbone is right, -1 if only the answer is right, and 0 otherwise. It needs labels for
    some records."""

    @property
    def lowest(self) -> float:
        """The smallest possible loss; the largest is 1."""
        return -1.0 if self is Risk.ACCURACY else 0.0

    def losses(self, answer: Tensor, backbone_class: Tensor, log_probabilities: Tensor,
               labels: Tensor | None = None) -> Tensor:
        """Return the (N, L) float32 losses of L possible answers to each of N records.

        Args:
            answer: (N, L) int64 classes, or `NO_CLASS` for an answer that is not a number. Its loss is that of the
                worst answer.
            backbone_class: (N,) int64 classes.
            log_probabilities: (N, K) log-probabilities of the backbone.
            labels: (N,) int64 true classes, for the risk `accuracy` only.

        Raises:
            RecordError: the risk needs labels, and none are given.
        """
        differs = answer != backbone_class[:, None]
        if self is Risk.DISAGREEMENT:
            return differs.float()
        if self is Risk.CONFIDENCE_GAP:
            probabilities = log_probabilities.float().exp()
            of_answer = probabilities.gather(1, answer.clamp_min(0))
            gap = (probabilities.gather(1, backbone_class[:, None]) - of_answer).clamp(0.0, 1.0) * differs
            return gap.masked_fill(answer == NO_CLASS, 1.0)
        if labels is None:
            raise RecordError("the risk 'accuracy' compares with true labels, but none are given: give labels of some "
                              "requests, or choose the risk 'disagreement' or 'confidence-gap', which need none")
        return (backbone_class == labels).float()[:, None] - (answer == labels[:, None]).float()
