"""Recorded requests that cannot be run again: they are passed over, and counted by the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from early_exit.handler.errors import RecordError

NOT_KEPT = "what the handler got was no JSON with bytes, so it could not be kept"
_Kind = tuple[type, str, int]
"""Type of an error, and the file and line that raised it."""


class Skipped:
    """Counts requests by the reason why they were passed over."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        """Go on counting.

        Args:
            counts: what `counts` said before.
        """
        self._counts = Counter(counts or {})
        self._reason_of: dict[_Kind, str] = {}

    @property
    def counts(self) -> dict[str, int]:
        """The number of requests by reason, the most common first."""
        return dict(self._counts.most_common())

    def count(self, reason: str) -> None:
        """Count one more request with a reason that is known by its text."""
        self._counts[reason] += 1

    def count_error(self, error: Exception) -> None:
        """Count one more request for which an error was raised.

        Messages may quote the request, so two errors are the same reason where one line of code raised both of one
        type; the reason is told in the words of the first.
        """
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        self.count(self._reason_of.setdefault(_kind_of(cause), str(error)))

    def report(self, n_requests: int, log: Callable[[str], None]) -> None:
        """Say in a line for each reason how many requests were passed over.

        Args:
            n_requests: that were tried.
            log: called with each line.

        Raises:
            RecordError: all of them were; the message shows the most common reason.
        """
        counts = self.counts
        if n_requests and sum(counts.values()) >= n_requests:
            reason, count = next(iter(counts.items()))
            raise RecordError(f"none of the {n_requests} recorded requests can be run again. The most common reason, "
                              f"of {count}: {reason}. Is this the archive that was recorded?")
        for reason, count in counts.items():
            log(f"{count} of {n_requests} recorded requests are passed over: {reason}")


def _kind_of(error: Exception) -> _Kind:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return (type(error), "", 0) if place is None else (type(error), place.tb_frame.f_code.co_filename, place.tb_lineno)
