"""What is watched of a certificate while a version serves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk

_REQUESTS_PER_LOSS = 20
"""A round about requests has so many samples as at the tolerated rate show that many losses."""
_REMEMBERED_PER_LOSS = 2
"""A content counts once while at the tolerated rate that many others are lost: one that comes for ever adds T / 2."""


@dataclass(frozen=True)
class Monitored:
    """What is watched: the loss, how much of it is tolerated, and how sure an alarm is."""

    risk: Risk
    tolerance: float
    """The expected loss that is tolerated."""
    delta: float
    """Probability of ever raising a false alarm at one level."""
    likeness: Likeness | None = None
    """By which samples make blocks; None where each is one of its own."""

    @classmethod
    def of(cls, certificate: Certificate, likeness: Likeness | None = None) -> Monitored:
        """Return what can be watched of a certificate without labels.

        For the risk of accuracy there are none in serving, so the disagreement is watched, against the upper
        confidence limit of what it was when the accuracy was certified. An alarm then says that the traffic is not
        like that of the certificate; a loss of accuracy at the same disagreement stays unseen. Records that were
        certified in blocks count for it as the number of blocks that would hold them if all had the largest size.
        """
        delta = 1 - certificate.confidence
        if certificate.risk == Risk.ACCURACY:
            size = max(1.0, certificate.largest_block)
            limit = upper_limit(math.ceil(certificate.k / size), max(1, int(certificate.n / size)), delta)
            return cls(Risk.DISAGREEMENT, limit, delta, likeness)
        return cls(certificate.risk, certificate.tolerance, delta, likeness)

    @property
    def samples_per_round(self) -> int:
        """How many samples a bet on the requests is about."""
        return max(1, round(_REQUESTS_PER_LOSS / self.tolerance))

    @property
    def n_remembered(self) -> int:
        """How many contents do not count again, as they were counted last."""
        return max(1, math.ceil(_REMEMBERED_PER_LOSS / self.tolerance))

    def losses(self, outputs: Tensor, reference: Tensor, kind: ScoreKind) -> list[float]:
        """Return what each answer lost, in [0, 1]; where that is no number, as the scores are none, it counts as 1.

        Args:
            outputs: (S, K) served scores of the shadow rows.
            reference: (S, K) the backbone's.
            kind: of both.
        """
        served, backbone = outputs.argmax(dim=1), reference.argmax(dim=1)
        losses = self.risk.losses(served[:, None], backbone, kind.log_probabilities(reference.float()))
        # An exit that names a class where the backbone has none differs from it, whatever argmax makes of NaN.
        is_other = outputs.isfinite().all(dim=1) & ~reference.isfinite().all(dim=1)
        return losses.flatten().masked_fill(is_other, 1.0).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0).tolist()

    def components(self, reference: Tensor, kind: ScoreKind) -> list[tuple[float, ...]]:
        """Return by what each of S samples is compared with its neighbours; nothing where none are.

        Args:
            reference: (S, K) the backbone's scores.
            kind: of them.
        """
        if self.likeness is None:
            return [()] * len(reference)
        # As they are recorded.
        states = kind.log_probabilities(reference.float()).cpu().half()
        components = self.likeness.components(states).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return [tuple(round(value, 4) for value in row) for row in components.tolist()]


def upper_limit(k: int, n: int, delta: float) -> float:
    """Return the p with P(Binomial(n, p) <= k) = delta: a larger one would seldom show so few (Clopper-Pearson).

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
