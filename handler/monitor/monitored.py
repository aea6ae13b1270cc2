"""The part of a certificate that the monitor watches while a version serves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk

_LOSSES_PER_ROUND = 20
"""The bets on requests take rounds of as many contents as have this many losses at the tolerated rate."""
_REMEMBERED_PER_LOSS = 20
"""A content counts again only if as many others came since as have this many losses at the tolerated rate. A content
that keeps coming therefore counts once, and 20 that come rarely are needed to exceed the tolerance."""


@dataclass(frozen=True)
class Monitored:
    """The loss that is watched, how much of it is tolerated, and the false-alarm rate."""

    risk: Risk
    tolerance: float
    """The expected loss that is tolerated."""
    delta: float
    """False-alarm rate: the probability of ever raising an alarm at one fallback level, while in every block and every
    round the expected loss, given the past, is at most the tolerance."""
    likeness: Likeness | None = None
    """How samples are compared to form blocks, or None if each sample is a block of its own."""

    @classmethod
    def of(cls, certificate: Certificate, likeness: Likeness | None = None) -> Monitored:
        """Return what can be watched of a certificate without labels.

        The risk `accuracy` needs labels, and serving has none. The monitor therefore watches the disagreement, against
        the upper confidence limit of the disagreement at the time of the certificate. An alarm then says that the
        traffic is not like that of the certificate; a loss of accuracy at the same disagreement is not noticed. For
        this limit, records that were certified in blocks count as the number of blocks that would hold them if all
        blocks had the largest size.
        """
        delta = 1 - certificate.confidence
        if certificate.risk == Risk.ACCURACY:
            size = max(1.0, certificate.largest_block)
            limit = upper_limit(math.ceil(certificate.k / size), max(1, int(certificate.n / size)), delta)
            return cls(Risk.DISAGREEMENT, limit, delta, likeness)
        return cls(certificate.risk, certificate.tolerance, delta, likeness)

    @property
    def contents_per_round(self) -> int:
        """The least number of contents in a round of the bets on requests."""
        return max(1, round(_LOSSES_PER_ROUND / self.tolerance))

    @property
    def n_remembered(self) -> int:
        """The number of contents that came most recently and do not count again."""
        return max(1, math.ceil(_REMEMBERED_PER_LOSS / self.tolerance))

    def losses(self, outputs: Tensor, reference: Tensor, kind: ScoreKind) -> list[float]:
        """Return the loss of each answer, in [0, 1]. A loss that is not a number, because the scores are not, is 1.

        Args:
            outputs: (S, K) served scores of the shadow rows.
            reference: (S, K) scores of the backbone.
            kind: the kind of both scores.
        """
        served, backbone = outputs.argmax(dim=1), reference.argmax(dim=1)
        losses = self.risk.losses(served[:, None], backbone, kind.log_probabilities(reference.float()))
        # An exit that predicts a class where the backbone has none differs from it, whatever argmax returns for NaN.
        is_other = outputs.isfinite().all(dim=1) & ~reference.isfinite().all(dim=1)
        return losses.flatten().masked_fill(is_other, 1.0).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).tolist()

    def components(self, reference: Tensor, kind: ScoreKind) -> list[tuple[float, ...]]:
        """Return the components by which each of S samples is compared with its neighbours; () if they are not.

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
