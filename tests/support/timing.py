"""CPU times of several ways to do the same, interleaved so that the noise of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def interleaved(arms: Mapping[str, Callable[[T], object]], rounds: Sequence[T],
                clock: Callable[[], float] = time.process_time) -> dict[str, list[float]]:
    """Return the seconds of each arm in every round after a warm-up, by default of CPU time. Call this in `one_thread`.

    The arms of a round run one after the other. Another arm goes first each time, because the others find warm caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm(rounds[0])
    names = list(arms)
    for number, item in enumerate(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            arms[name](item)
            seconds[name].append(clock() - started)
    return seconds


def median_ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Return the median over rounds of seconds / of, where every round is the same work."""
    return statistics.median(one / other for one, other in zip(seconds, of))


def ratio_of_sums(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Return sum(seconds) / sum(of), the ratio of the total costs of rounds that differ, as rounds with exits do: the
    median would be that of the more frequent kind."""
    return sum(seconds) / sum(of)
