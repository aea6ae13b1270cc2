"""Where things lie in an archive of `ee-archive`, and how to get at them; the only owner of these names."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from early_exit.handler.errors import ArchiveError

FOLDER = "early_exit"
HANDLER = "early_exit.handler.service"
"""The handler of every early-exit archive. Its code lies in the archive, in the namespace package `early_exit`."""
MANIFEST = "MAR-INF/MANIFEST.json"
DESCRIPTION_FILE = "backbone.json"
"""What is known of the backbone without loading it."""
PROGRAM_FILE = "backbone.pt2"
"""The exported program of the backbone."""
PROBE_FILE = "probe.safetensors"
"""The inputs on which the backbone is tried; the scores that they must give are in its description."""
TAIL_FILE = "detector.safetensors"
"""Weights of what follows a detector's stages, where the backbone is a detector's."""
PLAN_FILE = "plan.json"
HEADS_FILE = "heads.safetensors"
"""Weights of the plan's heads; it lies beside the plan."""


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
    def samples(self) -> Path:
        """Requests that the user's handler answers, where any are known."""
        return self.folder / "samples.json"

    @property
    def sample_request(self) -> Path:
        """What an archive of the last release has instead: the body of one."""
        return self.folder / "sample-request"

    @property
    def answers(self) -> Path:
        """What the original archive answered to the samples."""
        return self.folder / "answers.json"

    @property
    def handler_description(self) -> Path:
        """What was found out about the user's handler."""
        return self.folder / "handler.json"

    @property
    def plan(self) -> Path:
        return self.folder / PLAN_FILE


def extract(mar: Path, folder: Path) -> None:
    """Unpack a model archive into an existing folder.

    Raises:
        ArchiveError: it is no .mar, it is damaged, or an entry would land outside the folder.
    """
    try:
        with zipfile.ZipFile(mar) as archive:
            for name in archive.namelist():
                path = PurePosixPath(name.replace("\\", "/"))
                if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise ArchiveError(f"{mar} holds the entry {name!r}, which leaves the archive: refused")
            damaged = archive.testzip()
            if damaged is not None:
                raise ArchiveError(f"{mar} is damaged: the checksum of {damaged} is wrong")
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"cannot read {mar} as a model archive: {error}") from error
    if not (folder / MANIFEST).is_file():
        raise ArchiveError(f"{mar} has no {MANIFEST}: expected an archive made by torch-model-archiver")
