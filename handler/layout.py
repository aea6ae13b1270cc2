"""Where things lie in an archive of `ee-archive`; the only owner of these names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from early_exit.handler.plan import PLAN_FILE

FOLDER = "early_exit"
HANDLER = "early_exit.handler.service"
"""The handler of every early-exit archive. Its code lies in the archive, in the namespace package `early_exit`."""
MANIFEST = "MAR-INF/MANIFEST.json"


@dataclass(frozen=True)
class ArchiveLayout:
    """An extracted archive."""

    root: Path

    @property
    def folder(self) -> Path:
        """Everything of ours; all else belongs to the user."""
        return self.root / FOLDER

    @property
    def manifest(self) -> Path:
        return self.root / MANIFEST

    @property
    def original_manifest(self) -> Path:
        """The manifest that the user's own handler expects."""
        return self.folder / "original-manifest.json"

    @property
    def sample_request(self) -> Path:
        """Body of a request that the user's handler answers, where one is known."""
        return self.folder / "sample-request"

    @property
    def plan(self) -> Path:
        return self.folder / PLAN_FILE
