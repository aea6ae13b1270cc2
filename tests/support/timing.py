"""CPU time of two ways to do the same, interleaved so that the noise of the machine hits both."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from early_exit.archiver.server import ALLOCATOR

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


def run_with_the_servers_allocator(module: str) -> None:
    """Start `python -m module` again as ee-serve starts its workers: the allocator is part of the engine."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **ALLOCATOR})


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
