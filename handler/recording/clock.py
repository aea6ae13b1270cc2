"""Times on a machine whose clock may be set: times of records are corrected, and a clock that jumped is not trusted."""

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
"""A change of the clock up to this size is taken for a correction, not for a jump."""
_PROBATION_S = 24 * 3600.0
"""The time that a clock must run on after a jump before it is trusted. A gap larger than this is treated as a jump."""
_JITTER_S = 60.0
"""Times of consecutive events may be out of order by this much even if nobody sets the clock."""
_STATE_FILE = "clock.json"


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class ProcessClock:
    """The system clock, except that a jump ahead is ignored until the new setting has held for a day."""

    def __init__(self) -> None:
        self._booted = time.time() - _since_boot()
        """Unix time at which the machine was started, by the setting of the clock that is trusted."""
        self._ahead_since: float | None = None
        """When the clock was first found ahead of the trusted setting, in seconds since the machine was started, or
        None if it is not ahead."""

    def now(self) -> float:
        """Return the Unix time in seconds: that of the clock, unless the clock was set ahead less than a day ago."""
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
    """Correct the times of consecutive events for changes of the clock between them.

    The times in a longest non-decreasing subsequence are taken to be right: if a clock jumps and comes back, only the
    times in between are not in the subsequence. Every other time that is off by more than a minute is replaced by the
    time before it in that subsequence, or by the first time of the subsequence if there is none before it.

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
    """Return the positions of a longest non-decreasing subsequence, by patience sorting."""
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
    """The time that the processes sharing a folder trust."""

    time: float
    """The last trusted Unix time in seconds."""
    doubted_since: float | None = None
    """The Unix time that the clock showed when it was first found more than a day ahead of `time`, or None if it is
    not."""


class SharedClock:
    """The time by which old records are deleted. A clock that jumped ahead is not trusted.

    A process notices when the clock is set while it runs. The time before the process began is known from a file or, if
    there is none, from the newest of the records that may be deleted. If the clock is more than a day ahead of that
    time, either the clock was set, or nothing ran for a day. The clock is therefore trusted only after it has run on
    for another day.
    """

    def __init__(self, folder: Path) -> None:
        """Keep the trusted time in the folder that holds the records that may be deleted."""
        self._path = folder / _STATE_FILE

    def now(self, newest: float | None = None) -> float:
        """Return the Unix time, in seconds, by which the age of records is computed; it is never ahead of the clock.

        Args:
            newest: Unix time of the newest record that may be deleted, or None if there is none.
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
        except OSError:  # the disk is full, or a watcher sees the folder read-only
            return


def _after(before: _Believed | None, now: float) -> _Believed:
    """Return the trusted time after the clock has shown `now`."""
    if before is None or now - before.time <= _PROBATION_S:
        return _Believed(now)
    since = now if before.doubted_since is None or now < before.doubted_since else before.doubted_since
    return _Believed(now) if now - since > _PROBATION_S else _Believed(before.time, since)
