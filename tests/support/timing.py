"""CPU time of two ways to do the same, interleaved so that the noise of the machine hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def cpu_ratio(first: Callable[[T], object], second: Callable[[T], object], rounds: Sequence[T]) -> float:
    """Return the median over rounds of CPU time(second) / CPU time(first); run it in `one_thread`."""
    ratios = []
    for number, item in enumerate(rounds):
        # Who goes first alternates: the second finds warm caches.
        order = (first, second) if number % 2 else (second, first)
        taken = {}
        for function in order:
            started = time.process_time()
            function(item)
            taken[function] = time.process_time() - started
        ratios.append(taken[second] / taken[first])
    return statistics.median(ratios)
