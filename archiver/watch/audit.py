"""What a watcher decided and why: one JSON line each, only ever appended; and the lock that keeps watchers apart."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from early_exit.handler.errors import ServerError

AUDIT_FILE = "audit.jsonl"
Event = dict[str, Any]


class Audit:
    """The decisions about one model, oldest first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **evidence: Any) -> Event:
        """Write a decision down, with its evidence and the time; it is on disk when this returns."""
        line = {"time": time.time(), "event": event, **evidence}
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.path.open("a+b") as file:
            # A line that a crash cut short stays, on a line of its own.
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut_short = file.read(1) != b"\n"
            else:
                cut_short = False
            file.write((b"\n" if cut_short else b"") + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return line

    def read(self) -> list[Event]:
        """Return all decisions but lines that a crash cut short."""
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events

    def latest(self, *names: str) -> Event | None:
        """Return the latest decision of some kinds."""
        return next((event for event in reversed(self.read()) if event["event"] in names), None)


@contextlib.contextmanager
def only_watcher(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs; the kernel frees it when the process ends, however it ends.

    Raises:
        ServerError: another process holds it.
    """
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ServerError(f"another ee-watch (process {file.read().strip() or 'unknown'}) watches this model: "
                              f"{path} is locked") from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
