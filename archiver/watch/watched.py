"""The model that a watcher watches, with the settings of the watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from early_exit.archiver.audit import AUDIT_FILE, Audit
from early_exit.archiver.control import ModelServer
from early_exit.archiver.watch.triggers import Terms
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.training.options import TrainingOptions


@dataclass(frozen=True)
class Watched:
    """The model that is watched, with the settings of the watch."""

    model: str
    servers: Sequence[ModelServer]
    store: Path
    """The servers' model store."""
    sources: Sequence[str]
    """Folders and URLs with the servers' records."""
    state: Path
    """The folder for the audit, the runs and copies of records from URLs."""
    options: Callable[[ArchiveLayout], TrainingOptions]
    """Returns the training options for an extracted archive."""
    labels: Path | None
    """A CSV file of request ids and true classes, for the risk `accuracy`."""
    terms: Terms
    trial_samples: int
    """The number of shadow samples that a new version must pass before it is accepted."""
    longest_batch_s: float | None
    """How long an old version may take for one batch; None if a roll may measure it."""

    @property
    def audit(self) -> Audit:
        return Audit(self.state / AUDIT_FILE)
