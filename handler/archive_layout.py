"""The places of the files in an archive of `ee-archive`, and how to read them; no other module defines these names."""

from __future__ import annotations

import json
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from early_exit.handler.errors import ArchiveError
from early_exit.handler.files.names import bare_name

FOLDER = "early_exit"
HANDLER = "early_exit.handler.service"
"""The handler of every early-exit archive. Its code lies in the archive, in the namespace package `early_exit`."""
MANIFEST = "MAR-INF/MANIFEST.json"
DESCRIPTION_FILE = "backbone.json"
"""The description of the backbone, which can be read without loading it."""
PROGRAM_FILE = "backbone.pt2"
"""The exported program of the backbone."""
PROBE_FILE = "probe.safetensors"
"""The inputs on which the backbone is tested; the scores that it must compute for them are in its description."""
TAIL_FILE = "detector.safetensors"
"""Weights of the layers after a detector's stages, if the backbone is that of a detector."""
PLAN_FILE = "plan.json"
HEADS_FILE = "heads.safetensors"
"""Weights of the plan's exit heads. The file lies beside the plan."""
COMPILED = "__pycache__"
"""Folders of this name hold compiled Python, which Python can write again at any time; archives contain none."""
_NAMES = ("modelName", "modelVersion", "serializedFile", "modelFile", "configFile", "requirementsFile")
"""Values of a manifest that become part of a path."""
_SMALL_BYTES = 2**30
_MOST_EXPANSION = 20
"""An archive that unpacks to more than `_SMALL_BYTES` may unpack to at most this many times its own size: weights can
hardly be compressed."""


@dataclass(frozen=True)
class ArchiveLayout:
    """An extracted archive."""

    root: Path

    @property
    def folder(self) -> Path:
        """The folder of all files of this project; everything else in the archive belongs to the user."""
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
        """Requests that the user's handler answers, if any are known."""
        return self.folder / "samples.json"

    @property
    def sample_request(self) -> Path:
        """The file that an archive of the previous release has instead: the body of one request."""
        return self.folder / "sample-request"

    @property
    def answers(self) -> Path:
        """The answers of the original archive to the samples."""
        return self.folder / "answers.json"

    @property
    def handler_description(self) -> Path:
        """The description of the user's handler."""
        return self.folder / "handler.json"

    @property
    def sample_answers(self) -> Path:
        """JSON: the answers of the new archive to the first sample, by the exit that answered."""
        return self.folder / "sample-answers.json"

    @property
    def plan(self) -> Path:
        return self.folder / PLAN_FILE


def extract(mar: Path, folder: Path) -> None:
    """Unpack a model archive into an existing folder.

    Raises:
        ArchiveError: `mar` is not a .mar or is damaged, an entry would land outside the folder or is not a file, or all
            entries are far larger than the archive.
    """
    try:
        with zipfile.ZipFile(mar) as archive:
            require_harmless(archive, mar)
            damaged = archive.testzip()
            if damaged is not None:
                raise ArchiveError(f"{mar} is damaged: the checksum of {damaged} is wrong")
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"cannot read {mar} as a model archive: {error}") from error
    if not (folder / MANIFEST).is_file():
        raise ArchiveError(f"{mar} has no {MANIFEST}: expected an archive made by torch-model-archiver")


def require_harmless(archive: zipfile.ZipFile, mar: Path) -> None:
    """Check the names, kinds and sizes of an archive's entries, before any is read.

    Raises:
        ArchiveError: an entry would land outside the archive, is neither a file nor a folder, or occurs twice, or all
            entries are far larger than the archive.
    """
    names = set()
    for entry in archive.infolist():
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise ArchiveError(f"{mar} holds the entry {entry.filename!r}, which leaves the archive: refused")
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError(f"{mar} holds the entry {entry.filename!r}, which is a link or a device: refused, "
                               "because only files and folders are expected")
        if path in names:  # TorchServe may read one of the two, and this project the other
            raise ArchiveError(f"{mar} holds the entry {entry.filename!r} twice: refused, archive the model again")
        names.add(path)
    unpacked, packed = sum(entry.file_size for entry in archive.infolist()), mar.stat().st_size
    if unpacked > max(_SMALL_BYTES, _MOST_EXPANSION * packed):
        raise ArchiveError(f"{mar} has {packed} bytes and would unpack to {unpacked}: refused, as at most "
                           f"{_MOST_EXPANSION} times as many, or {_SMALL_BYTES}, are expected. If that is your model, "
                           "archive it without compression")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of an extracted archive and check that its names cannot lead out of their folders.

    Raises:
        ArchiveError: the file is not a manifest, or a name in it is not bare.
    """
    try:
        return checked_manifest(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        raise ArchiveError(f"cannot read the manifest {path}: {error}. Is the archive damaged?") from error


def checked_manifest(manifest: Any, source: str) -> dict[str, Any]:
    """Check that the names in a manifest cannot lead out of their folders, and return it.

    Args:
        manifest: the parsed JSON.
        source: where it was read, for messages.

    Raises:
        ArchiveError: `manifest` is not a manifest, or a name in it is not bare.
    """
    model = manifest.get("model") if isinstance(manifest, dict) else None
    if not isinstance(model, dict):
        raise ArchiveError(f"{source}: expected a manifest with a model, found {manifest!r:.80}: is the archive "
                           "damaged?")
    for key in _NAMES:
        value = model.get(key)
        if value not in (None, ""):
            bare_name(str(value) if isinstance(value, (int, float)) else value, f"{key} in {source}")
    handler = model.get("handler")
    if handler is not None:
        _require_handler(handler, source)
    checked: dict[str, Any] = manifest
    return checked


def _require_handler(handler: object, source: str) -> None:
    """Check a handler: a module, or a file, which may have a folder before it and a function after it."""
    file = handler.partition(":")[0] if isinstance(handler, str) else handler
    for part in file.split("/") if isinstance(file, str) else [file]:
        bare_name(part, f"handler {handler!r:.200} in {source}")
