"""The risk alarm: do the shadow samples still say what the certificate says?

Bets are placed on every shadow sample that the expected loss is above the tolerance T (see `betting`): the bets are
b / T for several b at once, the gain is loss - T. The alarm may be looked at after every sample, for ever. Half of the
capital is put down at the first sample, the rest is kept and put down in ever smaller parts, one every 100 samples: a
gambler who has lost all in a long quiet time would notice a change late.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.betting import after_round, rejects, wealth
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk
from early_exit.handler.formats import MONITOR_STATE

BETS = (0.02, 0.05, 0.1, 0.2, 0.4)
STAKE_EVERY = 100


@dataclass(frozen=True)
class Monitored:
    """What is watched: the loss, how much of it is tolerated, and how sure an alarm is."""

    risk: Risk
    tolerance: float
    """The expected loss that is tolerated."""
    delta: float
    """Probability of ever raising a false alarm at one step."""

    @classmethod
    def of(cls, certificate: Certificate) -> Monitored:
        """Return what can be watched of a certificate without labels.

        For the risk of accuracy there are none in serving, so the disagreement is watched, against the upper
        confidence limit of what it was when the accuracy was certified. An alarm then says that the traffic is not
        like that of the certificate; a loss of accuracy at the same disagreement stays unseen.
        """
        delta = 1 - certificate.confidence
        if certificate.risk == Risk.ACCURACY:
            return cls(Risk.DISAGREEMENT, upper_limit(certificate.k, certificate.n, delta), delta)
        return cls(certificate.risk, certificate.tolerance, delta)

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


@dataclass(frozen=True)
class Evidence:
    """What the shadow samples of one step say against the certificate."""

    n: int = 0
    """The number of samples."""
    lost: float = 0.0
    """The sum of the losses."""
    capital: tuple[float, ...] = (0.0,) * len(BETS)
    """What the stakes put down so far have become, by bet."""

    def after(self, loss: float, tolerance: float) -> Evidence:
        """Return the evidence after one more sample.

        >>> Evidence().after(0.0, 0.02).wealth() < 1 < Evidence().after(1.0, 0.02).wealth()
        True
        """
        number, into = divmod(self.n, STAKE_EVERY)
        put_down = 0.0 if into else 1 / ((number + 1) * (number + 2))  # these sum to 1
        bets = [bet / tolerance for bet in BETS]
        capital = after_round(self.capital, bets, loss - tolerance, put_down=put_down)
        return Evidence(self.n + 1, self.lost + loss, capital)

    def wealth(self) -> float:
        """Return the capital in all, kept or put down; it began with 1."""
        return wealth(self.capital, kept=1 / (-(-self.n // STAKE_EVERY) + 1))


@dataclass(frozen=True)
class Alarm:
    """Why a fallback level was left."""

    step: int
    """The level that was left; state files call it so."""
    time: float
    """Unix time in seconds."""
    n: int
    """The number of shadow samples that were answered at that level."""
    mean_loss: float
    wealth: float


@dataclass(frozen=True)
class MonitorState:
    """Where a version stands; each step back begins with fresh evidence."""

    step: int = 0
    """The fallback level; state files call it so. 0 is the plan as deployed, then its safer settings in order, then no
    exits."""
    evidence: Evidence = field(default_factory=Evidence)
    alarms: tuple[Alarm, ...] = ()
    """One for each step back; the first voids the certificate."""

    def after(self, samples: Iterable[tuple[int, float]], monitored: Monitored, last_level: int,
              now: float) -> MonitorState:
        """Return the state after some (level, loss) samples; those answered at another level do not count."""
        level, evidence, alarms = self.step, self.evidence, self.alarms
        for answered_at, loss in samples:
            if answered_at != level or level >= last_level:
                continue
            evidence = evidence.after(loss, monitored.tolerance)
            if rejects(evidence.wealth(), monitored.delta):
                alarms = (*alarms, Alarm(level, now, evidence.n, evidence.lost / evidence.n, evidence.wealth()))
                level, evidence = level + 1, Evidence()
        return MonitorState(level, evidence, alarms)

    def to_json(self) -> dict[str, Any]:
        return MONITOR_STATE.stamped({"certificate": "void" if self.alarms else "holds", **asdict(self)})

    @classmethod
    def from_json(cls, data: dict[str, Any], source: str) -> MonitorState:
        """Read a state.

        Raises:
            FormatError: its format is not one that this version reads.
            ValueError: it is none.
        """
        MONITOR_STATE.require(data, source)
        try:
            found = data["evidence"]
            state = cls(int(data["step"]), Evidence(int(found["n"]), float(found["lost"]), tuple(found["capital"])),
                        tuple(Alarm(**alarm) for alarm in data["alarms"]))
            numbers = [found["n"], found["lost"], *found["capital"],
                       *(number for alarm in data["alarms"] for number in alarm.values())]
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"expected finite numbers in the state of a monitor, found {numbers!r:.200}")
            return state
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"expected the state of a monitor, found {data!r:.80}") from error


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
