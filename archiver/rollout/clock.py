"""The clock of a roll: the machine's, or, in tests, one that takes no real time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Measures time and waits; its times cannot be compared with those of another clock."""

    def now(self) -> float:
        """Return the seconds since some moment; they never decrease."""

    def sleep(self, seconds: float) -> None:
        """Wait."""


class MachineClock:
    """The monotonic clock of this machine."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


MACHINE_CLOCK = MachineClock()
