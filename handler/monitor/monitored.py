"""The part of a certificate that the monitor watches while a version serves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind, predicted_class
from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk

_LOSSES_PER_ROUND = 20
"""The number of losses that a round of the bets on requests has at the tolerated rate. It sets the number of samples
in a round."""
_REMEMBERED_PER_LOSS = 20
"""The number of losses that the remembered contents have at the tolerated rate. It sets how many contents are
remembered. A remembered content is not counted again, so a content that keeps coming is counted once. Of the contents
that come rarely, 20 are needed to exceed the tolerance."""


@dataclass(frozen=True)
class Monitored:
    """The loss that is watched, how much of it is tolerated, and the false-alarm rate."""

    risk: Risk
    tolerance: float
    """The expected loss that is tolerated."""
    delta: float
    """False-alarm rate: the probability of ever raising an alarm at one fallback level, if the expected loss of every
    block and of every round, given the past, is at most the tolerance."""
    likeness: Likeness | None = None
    """How samples are compared to form blocks, or None if each sample is a block of its own."""

    @classmethod
    def of(cls, certificate: Certificate, likeness: Likeness | None = None) -> Monitored:
        """Return what can be watched of a certificate without labels.

        The risk `accuracy` needs labels, and serving has none. The monitor therefore watches the disagreement. Its
        tolerance is the upper confidence limit of the disagreement on the records of the certificate. An alarm then
        says that the traffic is not like that of the certificate. The monitor does not notice a loss of accuracy if the
        disagreement stays the same. This limit may be too low by chance. Therefore, one half of the false-alarm rate is
        spent on the limit, and the other half on the bets. If the records were certified in blocks, this limit is
        computed as if all blocks had the largest size and each block were one record.
        """
        delta = 1 - certificate.confidence
        if certificate.risk == Risk.ACCURACY:
            size = max(1.0, certificate.largest_block)
            limit = upper_limit(math.ceil(certificate.k / size), max(1, int(certificate.n / size)), delta / 2)
            return cls(Risk.DISAGREEMENT, limit, delta / 2, likeness)
        return cls(certificate.risk, certificate.tolerance, delta, likeness)

    @property
    def samples_per_round(self) -> int:
        """The least number of samples in a round of the bets on requests; see `Count.n_runs`."""
        return max(1, round(_LOSSES_PER_ROUND / self.tolerance))

    @property
    def n_remembered(self) -> int:
        """The number of latest contents that are remembered, and therefore not counted again."""
        return max(1, math.ceil(_REMEMBERED_PER_LOSS / self.tolerance))

    def losses(self, outputs: Tensor, reference: Tensor, kind: ScoreKind) -> list[float]:
        """Return the loss of each answer, in [0, 1].

        The loss is 1 if the answer predicts no class. A loss that is not finite becomes 1, too.

        Args:
            outputs: (S, K) served scores of the shadow rows.
            reference: (S, K) scores of the backbone, which all predict a class.
            kind: the kind of both scores.
        """
        served, backbone = predicted_class(outputs), reference.argmax(dim=1)
        losses = self.risk.losses(served[:, None], backbone, kind.log_probabilities(reference.float()))
        return losses.flatten().nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).tolist()

    def components(self, reference: Tensor, kind: ScoreKind) -> list[tuple[float, ...]]:
        """Return the components by which each of S samples is compared with its neighbours.

        If each sample is a block of its own, the components of every sample are ().

        Args:
            reference: (S, K) scores of the backbone.
            kind: the kind of these scores.
        """
        if self.likeness is None:
            return [()] * len(reference)
        # Records hold float16 as well, so the monitor and the certificate compare the same values.
        states = kind.log_probabilities(reference.float()).cpu().half()
        components = self.likeness.components(states).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return [tuple(round(value, 4) for value in row) for row in components.tolist()]


def upper_limit(k: int, n: int, delta: float) -> float:
    """Return the p with P(Binomial(n, p) <= k) = delta, the upper confidence limit of Clopper and Pearson.

    >>> round(upper_limit(0, 299, 0.05), 5)
    0.00997
    """
    def at_most_k(p: float) -> float:
        return sum(math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
                            + i * math.log(p) + (n - i) * math.log1p(-p)) for i in range(k + 1))

    low, high = 0.0, 1.0
    if k >= n:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most_k(middle) > delta else (low, middle)
    return high
