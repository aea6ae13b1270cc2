"""Waiting in a test for what happens elsewhere: in a server, a worker or a thread."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], object], what: str, limit_s: float = 60.0, every_s: float = 0.05) -> None:
    """Return as soon as a condition holds, which is asked every `every_s` seconds.

    Raises:
        AssertionError: it does not hold after `limit_s` seconds; the message is `what`.
    """
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(every_s)
