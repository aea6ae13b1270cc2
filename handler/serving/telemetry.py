"""What happens beside the answers of a batch: response headers, metrics, records, the monitor.

Each of them fails for itself: a header that cannot be set must not blind the monitor, and none may fail an answer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from early_exit.handler.serving.isolation import Served
from early_exit.handler.serving.metrics import ServingMetrics

logger = logging.getLogger(__name__)

SideWork = Callable[[Served], None]
"""Does something with what a call of the user's handler served, besides answering it."""


class Telemetry:
    """Runs every kind of side work for all that is served, and counts the failures of each."""

    def __init__(self, metrics: ServingMetrics, work: dict[str, SideWork]) -> None:
        """Take the work.

        Args:
            metrics: counts failures.
            work: by kind, in the order in which it is done.
        """
        self._metrics, self._work = metrics, work
        self._failing: set[str] = set()
        """The kinds that failed the last time, which are not logged again."""
        for kind in work:
            metrics.side_errors(kind, 0)  # a rate needs a value to begin with

    def note(self, served: Served) -> None:
        """Do all side work for what one call of the user's handler served; never raises."""
        for kind, work in self._work.items():
            try:
                work(served)
                self._failing.discard(kind)
            except Exception:
                self._failed(kind)

    def _failed(self, kind: str) -> None:
        if kind not in self._failing:
            logger.exception("%s fails; answers, and everything else beside them, go on", kind)
        self._failing.add(kind)
        with contextlib.suppress(Exception):  # the metrics may be what fails
            self._metrics.side_errors(kind, 1)
