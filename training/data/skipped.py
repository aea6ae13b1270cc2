"""Recorded requests that cannot be run again: they are skipped, and counted by the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from early_exit.handler.errors import RecordError

NOT_KEPT = ("the request was not kept: record with 'early_exit: {keep_requests: true}' in model-config.yaml. If that "
            "was set, the handler received something other than JSON and bytes, as the log of the workers says")
_Kind = tuple[type, str, int]
"""The type of an error, and the file and line that raised it."""


class Skipped:
    """Counts the requests that were skipped, by reason."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        """Start counting.

        Args:
            counts: an earlier value of `counts` to continue from.
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

        Messages may quote the request. Two errors therefore count as one reason if they have the same type and the same
        line of code raised both; the message of the first error names the reason.
        """
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        self.count(self._reason_of.setdefault(_kind_of(cause), str(error)))

    def report(self, n_requests: int, log: Callable[[str], None]) -> None:
        """Log for each reason how many requests were skipped.

        Args:
            n_requests: the number of requests that were tried.
            log: receives a line for each reason.

        Raises:
            RecordError: all requests were skipped; the message shows the most common reason.
        """
        counts = self.counts
        if n_requests and sum(counts.values()) >= n_requests:
            reason, count = next(iter(counts.items()))
            raise RecordError(f"none of the {n_requests} recorded requests can be run again. The most common reason, "
                              f"for {count} of them: {reason}. Is this the archive that was recorded?")
        for reason, count in counts.items():
            log(f"{count} of {n_requests} recorded requests are skipped: {reason}")


def _kind_of(error: Exception) -> _Kind:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return (type(error), "", 0) if place is None else (type(error), place.tb_frame.f_code.co_filename, place.tb_lineno)
