"""What may go wrong with an early answer, in three measures; the user chooses which one the certificate bounds."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from early_exit.handler.errors import RecordError


class Risk(str, Enum):
    """The loss of an early answer, compared with the backbone's; training certifies it and the monitor watches it."""

    DISAGREEMENT = "disagreement"
    """The loss is 1 where the class differs from the backbone's: no label and no assumption is needed."""
    CONFIDENCE_GAP = "confidence-gap"
    """The loss, in [0, 1], is how much less probable than its own class the backbone finds the answer: it bounds the
    expected drop of accuracy without labels, as long as the backbone is not under-confident."""
    ACCURACY = "accuracy"
    """The loss is 1 where only the backbone is right and -1 where only the answer is: it needs labels for some
    records."""

    @property
    def lowest(self) -> float:
        """The least loss there can be; the largest is 1."""
        return -1.0 if self is Risk.ACCURACY else 0.0

    def losses(self, answer: Tensor, backbone_class: Tensor, log_probabilities: Tensor,
               labels: Tensor | None = None) -> Tensor:
        """Return the (N, L) float32 losses of L possible answers to each of N records.

        Args:
            answer: (N, L) int64 classes.
            backbone_class: (N,) int64.
            log_probabilities: (N, K) of the backbone.
            labels: (N,) int64, for the risk of accuracy.

        Raises:
            RecordError: the risk needs labels.
        """
        differs = answer != backbone_class[:, None]
        if self is Risk.DISAGREEMENT:
            return differs.float()
        if self is Risk.CONFIDENCE_GAP:
            probabilities = log_probabilities.float().exp()
            gap = probabilities.gather(1, backbone_class[:, None]) - probabilities.gather(1, answer)
            return gap.clamp(0.0, 1.0) * differs
        if labels is None:
            raise RecordError("the risk 'accuracy' compares with true labels, but none are given: give labels of some "
                              "requests, or choose the risk disagreement or confidence-gap, which need none")
        return (backbone_class == labels).float()[:, None] - (answer == labels[:, None]).float()
