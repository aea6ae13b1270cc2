"""Where a backbone and the user's files come from: a .mar, a factory with weights, or an exported program."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.unpacking import is_packaged_model, unpack
from early_exit.handler.archive_layout import FOLDER, ArchiveLayout, read_manifest
from early_exit.handler.errors import ArchiveError

_OF_FACTORIES = {"weights": "--weights", "handler": "--handler", "extra_files": "--extra-files"}
_OF_ORIGINALS = {"input_shape": "--input-shape", "inputs": "--input", "output": "--output", "strategy": "--strategy",
                 "service_envelope": "--service-envelope"}
"""The options for a factory or an exported program, and those for a source whose model is not exported yet."""


@dataclass(frozen=True)
class Source:
    """The source of an archive. The user's files are in the archive's layout."""

    manifest: dict[str, Any]
    """The manifest that the user's handler expects."""
    is_ours: bool
    """Whether it is an early-exit archive already, whose backbone and samples are known."""

    has_model: bool
    """Whether the user's files hold the model, so that the handler can load it itself."""

    name: str
    """The name of the model. An early-exit archive may have been made under another name than the user's archive, which
    the handler still sees in its manifest."""

    version: str | None
    """The version of the model. The handler still sees that of the user's archive in its manifest."""

    @property
    def weights(self) -> str | None:
        """The name of the file with the user's own weights, if there is one."""
        name: str | None = self.manifest["model"].get("serializedFile")
        return name

    @property
    def configuration(self) -> str | None:
        """The name of the user's model-config.yaml, if there is one."""
        name: str | None = self.manifest["model"].get("configFile")
        return name


def unpack_source(request: ArchiveRequest, layout: ArchiveLayout) -> Source:
    """Lay out the user's files and return their description.

    Raises:
        ArchiveError: there is no such source, an option that it needs is missing, or a file has a name that we need.
    """
    source = _from_mar(request, layout) if is_packaged_model(request.source) else _from_parts(request, layout)
    for name in (FOLDER, f"{FOLDER}.py"):
        if not source.is_ours and (layout.root / name).exists():
            raise ArchiveError(f"the model's files contain {name}, but in an archive this name is that of the code for "
                               "early exits: rename it, and what imports it")
    return source


def _from_parts(request: ArchiveRequest, layout: ArchiveLayout) -> Source:
    """Lay out the handler for a factory or an exported program."""
    if not request.source.endswith(".pt2"):
        if ":" not in request.source:
            raise ArchiveError("expected a .mar, a .tar.gz, a folder with MAR-INF, a .pt2 or package.module:function, "
                               f"found {request.source!r}")
        if request.weights is None:
            raise ArchiveError("a factory needs --weights FILE.safetensors|.pth")
    manifest = _lay_out_handler(request, layout)
    return Source(manifest, is_ours=False, has_model=False, name=manifest["model"]["modelName"], version=None)


def _from_mar(request: ArchiveRequest, layout: ArchiveLayout) -> Source:
    unpack(Path(request.source), layout.root)
    manifest = read_manifest(layout.manifest)
    name, version = manifest["model"]["modelName"], manifest["model"].get("modelVersion")
    if not layout.original_manifest.exists():
        _refuse(request, _OF_FACTORIES, "which has its own")
        return Source(manifest, is_ours=False, has_model=True, name=name, version=version)
    _refuse(request, {**_OF_FACTORIES, **_OF_ORIGINALS}, "which ee-archive made, so that its model and its "
            "handler are known")
    original = read_manifest(layout.original_manifest)
    if "configFile" in manifest["model"]:
        original["model"]["configFile"] = manifest["model"]["configFile"]
    return Source(original, is_ours=True, has_model=True, name=name, version=version)


def _refuse(request: ArchiveRequest, options: Mapping[str, str], because: str) -> None:
    """Refuse options that would have no effect on the given source.

    Args:
        request: the archive to build.
        options: the fields of a request that have no effect, and the options that set them.
        because: what is said of the source.

    Raises:
        ArchiveError: such an option is given.
    """
    given = [option for name, option in options.items() if getattr(request, name)]
    if given:
        raise ArchiveError(f"{' and '.join(given)} would have no effect on {Path(request.source).name}, {because}: "
                           "leave it out")


def _lay_out_handler(request: ArchiveRequest, layout: ArchiveLayout) -> dict[str, Any]:
    """Copy the files given for a factory or .pt2 and return a manifest for their handler."""
    if request.handler is None or request.model_name is None:
        raise ArchiveError("a factory or .pt2 needs --handler (a file, or a built-in such as image_classifier), which "
                           "does pre- and post-processing, and --model-name")
    handler_file, colon, function = request.handler.partition(":")
    handler = [Path(handler_file)] if handler_file.endswith(".py") else []
    names = Counter(file.name for file in (*request.extra_files, *handler))
    if twice := [name for name, count in names.items() if count > 1]:
        raise ArchiveError(f"expected files with different names, found {twice[0]} more than once: give each file a "
                           "name of its own, because all of them go into one folder")
    for file in (*request.extra_files, *handler):
        if not file.is_file():
            raise ArchiveError(f"no such file: {file}")
        shutil.copyfile(file, layout.root / file.name)
    # 'modelFile' makes TorchServe's base handler ask for an eager model, which it is given.
    manifest = {"runtime": "python", "model": {"modelName": request.model_name, "modelFile": "exported.py",
                                               "handler": Path(handler_file).name + colon + function}}
    layout.manifest.parent.mkdir()
    layout.manifest.write_text(json.dumps(manifest))
    return manifest
