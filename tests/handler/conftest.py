"""A fixture that is shared by the tests of checks of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def timer() -> Iterator[None]:
    """Start a timer. As it may call the handler, nothing that changes meanwhile is restored after a check."""
    timer = threading.Timer(60, print)
    timer.start()
    yield
    timer.cancel()
    timer.join()
