"""The description that an archive of `ee-archive` contains of itself, read without unpacking the archive."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.handler.archive_layout import DESCRIPTION_FILE, ArchiveLayout, checked_manifest, require_harmless
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.errors import ArchiveError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.sample_request import SampleRequest, known_samples
from early_exit.handler.user_handler.description import HandlerDescription


@dataclass(frozen=True)
class ArchiveContents:
    """The contents of an early-exit archive, without its weights and its code."""

    manifest: Mapping[str, Any]
    """The manifest that TorchServe reads."""
    original_manifest: Mapping[str, Any]
    """The manifest that the user's own handler expects."""
    description: BackboneDescription
    plan: ExitPlan | None
    """The plan of the exits, or None if the archive answers every request in full."""
    configuration: str
    """Text of the model-config.yaml; empty if the archive has none."""
    handler: HandlerDescription
    """The description of the user's handler."""
    samples: tuple[SampleRequest, ...]
    """Requests that the user's handler answers, if any are known."""
    is_compared: bool
    """Whether the archive, without exits, was compared with the archive it was made from, and gave the same answers."""
    sample_answers: Mapping[str, Any]
    """By exit: the archive's answer to the first sample at the time it was made; empty if it was not stored."""

    @property
    def model(self) -> str:
        """The name under which TorchServe serves the archive."""
        return str(self.manifest["model"]["modelName"])

    @property
    def version(self) -> str:
        return str(self.manifest["model"]["modelVersion"])


def read_archive(mar: Path) -> ArchiveContents:
    """Read the description of an early-exit archive, and nothing else of the archive.

    Raises:
        ArchiveError: `mar` is not an early-exit archive, or it is damaged.
        FormatError: this version does not read the format of the archive or of its plan.
        PlanError: the archive's plan is incomplete.
    """
    try:
        with zipfile.ZipFile(mar) as archive:
            return _read(mar, archive)
    # zipfile raises these for entries that are damaged, truncated, encrypted or compressed in a way it does not know.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, UnicodeDecodeError) as error:
        raise ArchiveError(f"cannot read {mar}: {error}") from error


def _read(mar: Path, archive: zipfile.ZipFile) -> ArchiveContents:
    require_harmless(archive, mar)
    layout, names = ArchiveLayout(Path()), set(archive.namelist())
    description = layout.folder / DESCRIPTION_FILE
    required = (layout.manifest, layout.original_manifest, description)
    if missing := [path.as_posix() for path in required if path.as_posix() not in names]:
        raise ArchiveError(f"{mar} is not an early-exit archive: it has no {' and no '.join(missing)}. Make one with "
                           f"'ee-archive {mar}'")

    def content(path: Path) -> bytes | None:
        return archive.read(path.as_posix()) if path.as_posix() in names else None

    manifest = _parsed(content(layout.manifest), f"{mar}: {layout.manifest}")
    model = manifest.get("model")
    if not isinstance(model, dict) or not {"modelName", "modelVersion"} <= model.keys():
        raise ArchiveError(f"{mar}: expected the name and the version of a model in {layout.manifest}, found "
                           f"{model!r:.80}: is the archive damaged?")
    manifest = checked_manifest(manifest, f"{mar}: {layout.manifest}")
    original = _parsed(content(layout.original_manifest), f"{mar}: {layout.original_manifest}")
    plan, answers, configuration = content(layout.plan), content(layout.sample_answers), model.get("configFile")
    handler = content(layout.handler_description)
    return ArchiveContents(
        manifest=manifest,
        original_manifest=checked_manifest(original, f"{mar}: {layout.original_manifest}"),
        description=BackboneDescription.from_json(_parsed(content(description), f"{mar}: {description}"),
                                                  f"{mar}: {description}"),
        plan=None if plan is None else ExitPlan.from_json(_parsed(plan, f"{mar}: {layout.plan}"),
                                                          f"{mar}: {layout.plan}"),
        configuration=(content(Path(configuration)) or b"").decode() if configuration else "",
        handler=HandlerDescription() if handler is None else HandlerDescription.from_json(
            _parsed(handler, f"{mar}: {layout.handler_description}"), f"{mar}: {layout.handler_description}"),
        samples=known_samples(content(layout.samples), content(layout.sample_request), f"{mar}: {layout.samples}"),
        is_compared=layout.answers.as_posix() in names,
        sample_answers={} if answers is None else _parsed(answers, f"{mar}: {layout.sample_answers}"))


def _parsed(content: bytes | None, source: str) -> dict[str, Any]:
    try:
        value = json.loads(content or b"")
    except ValueError as error:
        raise ArchiveError(f"{source} is not JSON, so the archive is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ArchiveError(f"{source}: expected a JSON object, found {value!r:.80}: is the archive damaged?")
    return value
