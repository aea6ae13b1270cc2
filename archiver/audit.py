"""The audit of a model: the decisions of a watcher or an operator and their reasons, one JSON line each.

Lines are only appended. `ee-watch` and `ee-exits` write one audit each, and the gateway's page shows both.
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
    """Return the audit of a model below a folder: the folder of the watchers or the folder of the switches.

    Raises:
        ServerError: the name of the model leads out of the folder.
    """
    return Audit(folder / bare_name(model, "the name of a model", ServerError) / AUDIT_FILE)


class Audit:
    """The decisions about one model, oldest first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **evidence: Any) -> Event:
        """Append a decision, with its evidence and the time; it is on disk when this returns.

        Errors in the evidence may name URLs, and the gateway's page shows them, so credentials in URLs are left out.

        Raises:
            OSError: the line cannot be written, or the file or its folder belongs to somebody else.
        """
        line = all_without_credentials({"time": time.time(), "event": event, **evidence})
        private_folder(self.path.parent)
        with open_private(self.path, "a+b") as file:
            # An incomplete line, which a crash has left, stays on a line of its own.
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
        """Return all decisions, without lines that a crash left incomplete.

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
                events.append(all_without_credentials(json.loads(line)))  # older audits hold credentials
        return events

    def latest(self, *names: str) -> Event | None:
        """Return the latest decision of the given kinds; None if there is none."""
        return next((event for event in reversed(self.read()) if event["event"] in names), None)
