"""The bypass of exits that do not save time. A few control batches run the other way, to compare the two ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from early_exit.handler.betting import after_round, rejects, wealth

DELTA = 0.01
"""For each test, the probability of ever changing from the cheaper way to the more expensive way."""
BETS = (0.1, 0.2, 0.4, 0.8)
_WARM_UP = 5
"""The number of first pairs that only set the scale; no bets are placed on them."""


@dataclass
class Comparison:
    """A sequential test of "this way costs no more than the other", on pairs of times in seconds.

    For every pair, the bets are that this way costs more (see `betting`). The gain is the difference of the pair,
    divided by twice the other way's mean time in earlier pairs, and clipped to [-1, 1]. The test is about the mean
    difference, not about how often one way is slower, because one batch that leaves early can save more time than
    several other batches lose.
    """

    n: int = 0
    """The number of pairs that have been added."""
    other_s: float = 0.0
    """The sum of the other way's times in seconds."""
    capital: tuple[float, ...] = (1.0,) * len(BETS)
    """The current capital of each bet."""

    def add(self, this_s: float, other_s: float) -> None:
        if self.n >= _WARM_UP:
            difference = (this_s - other_s) / (2 * self.other_s / self.n)
            self.capital = after_round(self.capital, BETS, max(-1.0, min(1.0, difference)))
        self.n += 1
        self.other_s += other_s

    @property
    def rejected(self) -> bool:
        return rejects(wealth(self.capital), DELTA)


@dataclass
class _Bucket:
    with_exits: bool = True
    """Whether batches of these sizes take the exits, except for control batches."""
    test: Comparison = field(default_factory=Comparison)


class AdaptiveBypass:
    """Decides for each batch whether it takes the exits.

    Batch sizes from one power of two to the next are judged together, but only batches of the same size are compared.
    If the test finds that a way costs more, only the control batches take this way from then on, so that later changes
    are noticed.
    """

    def __init__(self, control_rate: float, draw: Callable[[], float]) -> None:
        """Begin with exits.

        Args:
            control_rate: the share of batches that go the other way; with 0, all batches take the exits.
            draw: returns uniform numbers in [0, 1).
        """
        self._control_rate, self._draw = control_rate, draw
        self._buckets: dict[int, _Bucket] = {}
        self._latest: dict[int, float] = {}
        """For each batch size, the seconds of the latest batch that was not a control batch."""

    def takes_exits(self, n_rows: int) -> bool:
        """Tell whether a batch with this number of rows takes the exits."""
        is_control = self._draw() < self._control_rate
        return self._bucket(n_rows).with_exits != is_control

    def measured(self, n_rows: int, seconds: float, *, with_exits: bool) -> None:
        """Note the time that a batch took."""
        bucket = self._bucket(n_rows)
        if with_exits == bucket.with_exits:
            self._latest[n_rows] = seconds
        elif n_rows in self._latest:
            bucket.test.add(self._latest.pop(n_rows), seconds)
            if bucket.test.rejected:
                self._buckets[_power(n_rows)] = _Bucket(not bucket.with_exits)
                self._latest = {size: s for size, s in self._latest.items() if _power(size) != _power(n_rows)}

    def bypassed(self) -> dict[int, bool]:
        """Return whether exits are bypassed, by the largest of the batch sizes that are judged together."""
        return {power: not bucket.with_exits for power, bucket in self._buckets.items()}

    def _bucket(self, n_rows: int) -> _Bucket:
        return self._buckets.setdefault(_power(n_rows), _Bucket())


def _power(n_rows: int) -> int:
    """Return the smallest power of two that is at least `n_rows`.

    >>> [_power(size) for size in (1, 2, 3, 4, 5, 8, 9)]
    [1, 2, 4, 4, 8, 8, 16]
    """
    return 1 << max(0, n_rows - 1).bit_length()
