"""Time by clocks that are set while records are made: what can be known of it, and what is not to be believed."""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from early_exit.handler.files.private import read_private, replacing

_JUMP_S = 3600.0
"""A clock that is set by no more than this has only been corrected."""
_PROBATION_S = 24 * 3600.0
"""For how long a clock has to go on from where it is after a gap, before it is believed."""
_JITTER_S = 60.0
"""Times of what happened one after the other may be out of order by so much without anybody having set the clock."""
_STATE_FILE = "clock.json"


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class ProcessClock:
    """Goes on as the clock was set when this process began, until another setting has held for a day."""

    def __init__(self) -> None:
        self._booted = time.time() - _since_boot()
        """Unix time at which the machine was started, by the setting that is believed."""
        self._ahead_since: float | None = None
        """Seconds since the machine was started at which the clock was first seen ahead of that."""

    def now(self) -> float:
        """Return the Unix time in seconds; that of the clock, unless it was set ahead less than a day ago."""
        now, since_boot = time.time(), _since_boot()
        steady = self._booted + since_boot
        if now - steady <= _JUMP_S:
            self._ahead_since = None
            return now
        self._ahead_since = since_boot if self._ahead_since is None else self._ahead_since
        if since_boot - self._ahead_since <= _PROBATION_S:
            return steady
        self._booted, self._ahead_since = now - since_boot, None
        return now


_PROCESS = ProcessClock()


def in_order(times: Sequence[float]) -> list[float]:
    """Return the times of what happened one after the other as they were by a clock that nobody set meanwhile.

    A longest subsequence that does not descend is taken for right: a clock that jumps and comes back leaves it for a
    while. Each other time that is off by more than a minute is replaced by the one before it in that subsequence, or
    behind it where there is none.

    >>> in_order([1000.0, 2000.0, 90000.0, 91000.0, 3000.0, 4000.0, 5000.0])
    [1000.0, 2000.0, 2000.0, 2000.0, 3000.0, 4000.0, 5000.0]
    """
    right = _longest_ascent(times)
    corrected, known = list(times), times[right[0]] if right else math.nan
    is_right = set(right)
    for position, found in enumerate(times):
        if position in is_right:
            known = found
        elif abs(found - known) > _JITTER_S:
            corrected[position] = known
    return corrected


def _longest_ascent(times: Sequence[float]) -> list[int]:
    """Return the positions of a longest subsequence that does not descend, by patience sorting."""
    ends: list[float] = []
    last: list[int] = []
    before: list[int] = []
    for position, value in enumerate(times):
        length = bisect_right(ends, value)
        before.append(last[length - 1] if length else -1)
        ends[length:length + 1], last[length:length + 1] = [value], [position]
    chain, position = list[int](), last[-1] if last else -1
    while position >= 0:
        chain.append(position)
        position = before[position]
    return chain[::-1]


@dataclass(frozen=True)
class _Believed:
    """What the processes that share a folder believe of its clock."""

    time: float
    """Unix time in seconds: the last that was believed."""
    doubted_since: float | None = None
    """The clock when it was first seen more than a day ahead of that; none where it is not."""


class SharedClock:
    """Says what time it is at least, for the deletion of what is old: a clock that jumped ahead is not believed.

    A process knows when the clock is set while it runs. What it was before the process began is known from a file, or,
    where there is none, by the newest of what may be deleted: when the clock is a day ahead of that, it may have been
    set, or nothing may have run for a day. It is believed once it has gone on for another day.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder of what may be deleted."""
        self._path = folder / _STATE_FILE

    def now(self, newest: float | None = None) -> float:
        """Return the Unix time, in seconds, by which something is old; at most what the clock says.

        Args:
            newest: Unix time of the newest of what may be deleted, if there is anything.
        """
        now = _PROCESS.now()
        noted = self._read()
        before = _Believed(newest) if noted is None and newest is not None else noted
        believed = _after(before, now)
        if noted is None or believed.doubted_since != noted.doubted_since or abs(now - noted.time) > _JUMP_S:
            self._write(believed)
        return min(now, believed.time) if believed.doubted_since is not None else now

    def _read(self) -> _Believed | None:
        try:
            noted = json.loads(read_private(self._path))
            believed = _Believed(float(noted["time"]), noted["doubted_since"] and float(noted["doubted_since"]))
        except (OSError, ValueError, TypeError, LookupError):
            return None
        return believed if math.isfinite(believed.time) and math.isfinite(believed.doubted_since or 0.0) else None

    def _write(self, believed: _Believed) -> None:
        if not self._path.parent.is_dir():
            return
        try:
            with replacing(self._path) as scratch:
                scratch.write_text(json.dumps(asdict(believed)))
        except OSError:  # the disk is full, or it is a watcher's view of the folder
            return


def _after(before: _Believed | None, now: float) -> _Believed:
    """Return what is believed once the clock says a time."""
    if before is None or now - before.time <= _PROBATION_S:
        return _Believed(now)
    since = now if before.doubted_since is None or now < before.doubted_since else before.doubted_since
    return _Believed(now) if now - since > _PROBATION_S else _Believed(before.time, since)
