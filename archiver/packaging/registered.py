"""The data that a server reads from an archive that it registers, whether `ee-archive` or the user made the archive."""

from __future__ import annotations

import json
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.sources.unpacking import unpack
from early_exit.handler.archive_contents import ArchiveContents, read_archive
from early_exit.handler.archive_layout import (
    HANDLER,
    MANIFEST,
    ArchiveLayout,
    checked_manifest,
    read_manifest,
    require_harmless,
)
from early_exit.handler.config import EARLY, ServingConfig
from early_exit.handler.errors import ArchiveError
from early_exit.training.text_files import parse_yaml

_FIRST_VERSION = "1.0"
"""The version that TorchServe assumes if a manifest names none."""


@dataclass(frozen=True)
class RegisteredArchive:
    """An archive as a server sees it, read without unpacking it."""

    model: str
    """The name that the model is served under unless another is given."""
    version: str
    configured: RunSettings
    """The settings in its model-config.yaml that TorchServe accepts."""
    may_have_more_workers: bool
    """Whether the model may have more workers than its configuration says; early answers need exactly one."""
    ours: ArchiveContents | None
    """The contents that `ee-archive` has written; None for an archive of torch-model-archiver."""

    @property
    def made_from(self) -> str | None:
        """The name and version of the archive from which `ee-archive` made this one; None if there is none."""
        if self.ours is None or not (version := self.ours.original_manifest["model"].get("modelVersion")):
            return None
        return f"{self.ours.original_manifest['model']['modelName']} {version}"


def registered_archive(mar: Path) -> RegisteredArchive:
    """Read an archive as a server will see it.

    Args:
        mar: an archive, in any of the formats of torch-model-archiver.

    Raises:
        ArchiveError: the file is not such an archive, or is damaged.
        ConfigError: `ee-archive` made the archive, and its configuration holds a wrong setting.
        FormatError: `ee-archive` made the archive, in a format that this version does not read.
        PlanError: the archive's plan is incomplete.
    """
    manifest, configuration = _read(mar) if mar.suffix == ".mar" and not mar.is_dir() else _unpacked(mar)
    model = manifest["model"]
    if not model.get("modelName"):
        raise ArchiveError(f"{mar} names no model: expected modelName in {MANIFEST}, found {model!r:.80}")
    ours = read_archive(mar) if model.get("handler") == HANDLER else None
    content = parse_yaml(configuration, f"model-config.yaml in {mar}")
    content = content if isinstance(content, dict) else {}
    early = ours is not None and ServingConfig.from_model_config(content).answers == EARLY
    return RegisteredArchive(str(model["modelName"]), str(model.get("modelVersion") or _FIRST_VERSION),
                             _configured(content), not early, ours)


def _configured(content: dict[str, Any]) -> RunSettings:
    """Return the settings of a configuration that TorchServe accepts: whole numbers above 0, and workers as a pair in
    ascending order."""
    def number(name: str) -> int | None:
        value = content.get(name)
        return value if type(value) is int and value > 0 else None

    least, most = number("minWorkers"), number("maxWorkers")
    return RunSettings(number("batchSize"), number("maxBatchDelay"), number("responseTimeout"),
                       (least, most) if least is not None and most is not None and most >= least else None)


def _read(mar: Path) -> tuple[dict[str, Any], str]:
    """Return a .mar's manifest and the text of its model-config.yaml, without unpacking it."""
    try:
        with zipfile.ZipFile(mar) as archive:
            require_harmless(archive, mar)
            if MANIFEST not in archive.namelist():
                raise ArchiveError(f"{mar} has no {MANIFEST}: expected an archive made by torch-model-archiver or "
                                   "ee-archive")
            manifest = checked_manifest(json.loads(archive.read(MANIFEST)), f"{mar}: {MANIFEST}")
            file = manifest["model"].get("configFile")
            has_file = bool(file) and file in archive.namelist()
            return manifest, archive.read(file).decode() if has_file else ""
    # zipfile raises these for entries that are damaged, truncated, encrypted, or compressed in a way it does not know.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError) as error:
        raise ArchiveError(f"cannot read {mar}: {error}. Is it a .mar, and complete?") from error


def _unpacked(source: Path) -> tuple[dict[str, Any], str]:
    """Return the manifest and the text of the model-config.yaml of a .tar.gz or of a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        unpack(source, layout.root)
        manifest = read_manifest(layout.manifest)
        file = manifest["model"].get("configFile")
        try:
            return manifest, (layout.root / file).read_text("utf-8") if file and (layout.root / file).is_file() else ""
        except (OSError, ValueError) as error:
            raise ArchiveError(f"cannot read {file} in {source}: {error}") from error
