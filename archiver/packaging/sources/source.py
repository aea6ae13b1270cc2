"""Where a backbone and the user's files come from: a .mar, a factory with weights, or an exported program."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.detector import backbone_of_detector, is_detector
from early_exit.archiver.packaging.sources.eager_model import eager_model, model_from_factory
from early_exit.archiver.packaging.sources.sample import image_input, model_input
from early_exit.archiver.packaging.sources.unpacking import is_packaged_model, unpack
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.program_file import load_program
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.errors import ArchiveError


@dataclass(frozen=True)
class Source:
    """What an archive is made of; the user's files lie in its layout."""

    manifest: dict[str, Any]
    """The manifest that the user's handler expects."""
    backbone: Backbone
    """The user's model, exported."""

    @property
    def weights(self) -> str | None:
        """Name of the file with the user's own weights, where there is one."""
        name: str | None = self.manifest["model"].get("serializedFile")
        return name

    def configuration(self, layout: ArchiveLayout) -> Path | None:
        """Return the user's model-config.yaml, where there is one."""
        name = self.manifest["model"].get("configFile")
        return layout.root / name if name else None


def unpack_source(request: ArchiveRequest, layout: ArchiveLayout) -> Source:
    """Lay out the user's files and return the manifest that their handler expects, and the backbone.

    Raises:
        EarlyExitError: there is no such source, something that it needs was not given, or its model cannot be exported.
    """
    if is_packaged_model(request.source):
        return _from_mar(request, layout)
    manifest = _lay_out_handler(request, layout)
    if request.source.endswith(".pt2"):
        return Source(manifest, Backbone.from_program(load_program(Path(request.source))))
    if ":" not in request.source:
        raise ArchiveError(f"expected a .mar, a .tar.gz, a folder with MAR-INF, a .pt2 or package.module:function, found {request.source!r}")
    if request.weights is None or (request.input_shape is None and not request.inputs):
        raise ArchiveError("a factory needs --weights FILE.safetensors|.pth, and --input-shape, such as 3,224,224, or "
                           "an --input NAME:DTYPE:SHAPE for each input")
    model = model_from_factory(request.source, request.weights)
    if is_detector(model):
        raise ArchiveError("what a detector does cannot all be exported: give a .mar with its model file")
    return Source(manifest, _exported(model, request))


def _from_mar(request: ArchiveRequest, layout: ArchiveLayout) -> Source:
    unpack(Path(request.source), layout.root)
    manifest: dict[str, Any] = json.loads(layout.manifest.read_text())
    if not layout.original_manifest.exists():
        return Source(manifest, _backbone_of_mar(request, layout, manifest))
    original: dict[str, Any] = json.loads(layout.original_manifest.read_text())
    original["model"] |= {key: manifest["model"][key] for key in ("modelVersion", "configFile")
                          if key in manifest["model"]}
    return Source(original, load_backbone(layout.folder))


def _backbone_of_mar(request: ArchiveRequest, layout: ArchiveLayout, manifest: dict[str, Any]) -> Backbone:
    serialized = str(manifest["model"].get("serializedFile"))
    if serialized.endswith(".pt2") and not manifest["model"].get("modelFile"):
        return Backbone.from_program(load_program(layout.root / serialized))
    model = eager_model(layout.root, manifest)
    if is_detector(model):
        return backbone_of_detector(model, request.input_shape, request.strategy, request.pedestrian,
                                    manifest["model"]["modelFile"])
    if request.strategy is not None:
        raise ArchiveError(f"{type(model).__name__} is no detector of torchvision, so it has no --strategy")
    if request.input_shape is not None or request.inputs:
        return _exported(model, request)
    if request.request is not None:
        return Backbone.from_module(model, *model_input(layout.root, manifest, request.request.read_bytes()))
    return Backbone.from_module(model, *image_input(layout.root, manifest))


def _exported(model: nn.Module, request: ArchiveRequest) -> Backbone:
    if request.inputs:
        return Backbone.from_inputs(model, request.inputs)
    return Backbone.from_module(model, request.input_shape or ())


def _lay_out_handler(request: ArchiveRequest, layout: ArchiveLayout) -> dict[str, Any]:
    """Copy the files given for a factory or .pt2 and return a manifest for their handler."""
    if request.handler is None or request.model_name is None:
        raise ArchiveError("a factory or .pt2 needs --handler (a file, or a built-in such as image_classifier), which "
                           "does pre- and post-processing, and --model-name")
    handler = [Path(request.handler)] if request.handler.endswith(".py") else []
    for file in (*request.extra_files, *handler):
        if not file.is_file():
            raise ArchiveError(f"no such file: {file}")
        shutil.copyfile(file, layout.root / file.name)
    # 'modelFile' makes TorchServe's base handler ask for an eager model, which it is given.
    return {"runtime": "python", "model": {"modelName": request.model_name, "handler": Path(request.handler).name,
                                           "modelFile": "exported.py"}}
