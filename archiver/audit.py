"""What a watcher, or an operator, decided about a model and why: one JSON line each, only ever appended.

`ee-watch` and `ee-exits` write one each, and the gateway's page shows both.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from early_exit.handler.errors import ServerError
from early_exit.handler.files.names import bare_name
from early_exit.handler.files.private import open_private, private_folder, read_private
from early_exit.training.credentials import all_without_credentials

AUDIT_FILE = "audit.jsonl"
Event = dict[str, Any]


def audit_of(folder: Path, model: str) -> Audit:
    """Return the decisions about a model that are kept below a folder: that of a watcher, or of the switches.

    Raises:
        ServerError: the name of the model leads out of the folder.
    """
    return Audit(folder / bare_name(model, "the name of a model", ServerError) / AUDIT_FILE)


class Audit:
    """The decisions about one model, oldest first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **evidence: Any) -> Event:
        """Write a decision down, with its evidence and the time; it is on disk when this returns.

        Errors in the evidence may name URLs, and the gateway's page shows them: credentials in these are left out.

        Raises:
            OSError: it cannot be written, or its file or folder belongs to somebody else.
        """
        line = all_without_credentials({"time": time.time(), "event": event, **evidence})
        private_folder(self.path.parent)
        with open_private(self.path, "a+b") as file:
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
        """Return all decisions but lines that a crash cut short.

        Raises:
            OSError: the file cannot be read, or belongs to somebody else.
        """
        try:
            text = read_private(self.path)
        except FileNotFoundError:
            return []
        events = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                events.append(all_without_credentials(json.loads(line)))  # audits of before hold them
        return events

    def latest(self, *names: str) -> Event | None:
        """Return the latest decision of some kinds."""
        return next((event for event in reversed(self.read()) if event["event"] in names), None)
