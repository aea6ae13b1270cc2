"""What a watcher decided about a model and why: one JSON line each, only ever appended.

The watcher writes it, and the gateway's page shows it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from early_exit.training.credentials import all_without_credentials

AUDIT_FILE = "audit.jsonl"
Event = dict[str, Any]


class Audit:
    """The decisions about one model, oldest first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **evidence: Any) -> Event:
        """Write a decision down, with its evidence and the time; it is on disk when this returns.

        Errors in the evidence may name URLs, and the gateway's page shows them: credentials in these are left out.
        """
        line = all_without_credentials({"time": time.time(), "event": event, **evidence})
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
                events.append(all_without_credentials(json.loads(line)))  # audits of before hold them
        return events

    def latest(self, *names: str) -> Event | None:
        """Return the latest decision of some kinds."""
        return next((event for event in reversed(self.read()) if event["event"] in names), None)
