"""A clock for several threads that takes no real time, so that the threads interleave in the same way each time."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class VirtualClock:
    """A clock whose time passes when all threads sleep. The first one to wake then runs alone until it sleeps again."""

    def __init__(self) -> None:
        self._now = 0.0
        self._n_threads = 1
        self._wakes: dict[int, tuple[float, int]] = {}
        """For each sleeping thread, the time when it wakes, and its number in the order of falling asleep for ties."""
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        me = threading.get_ident()
        with self._changed:
            self._wakes[me] = (self._now + seconds, next(self._numbers))
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._wakes) == self._n_threads and
                                   self._wakes.get(me) == min(self._wakes.values()))
            self._now = max(self._now, self._wakes.pop(me)[0])

    def run(self, calls: Sequence[tuple[float, Callable[[], T]]]) -> list[T | Exception]:
        """Begin each call after the given seconds, in a thread of its own; return what the calls return or raise."""
        outcomes: list[T | Exception] = [RuntimeError("it did not end")] * len(calls)

        def one(number: int, begins_s: float, call: Callable[[], T]) -> None:
            self.sleep(begins_s)
            try:
                outcomes[number] = call()
            except Exception as error:
                outcomes[number] = error
            finally:
                with self._changed:
                    self._n_threads -= 1
                    self._changed.notify_all()

        threads = [threading.Thread(target=one, args=(number, *call)) for number, call in enumerate(calls)]
        self._n_threads = len(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._n_threads = 1
        return outcomes
