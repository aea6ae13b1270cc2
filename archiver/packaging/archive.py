"""Writes an early-exit .mar: self-contained, the same bytes for the same input, published by rename."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from tqdm import tqdm

import early_exit.handler
from early_exit.archiver.packaging.detector import PEDESTRIAN, backbone_of_detector, is_detector
from early_exit.archiver.packaging.publish import publish, zip_folder
from early_exit.archiver.packaging.quantize import quantize, recorded_inputs
from early_exit.archiver.packaging.sample import image_input, model_input, sample_image
from early_exit.archiver.packaging.source import eager_model, model_from_factory
from early_exit.archiver.packaging.validate import validate
from early_exit.handler.archive_layout import HANDLER, ArchiveLayout, extract
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription, load_program
from early_exit.handler.backbone.image_class import Strategy
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.config import EARLY, ServingConfig
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.openvino import PIECES
from early_exit.handler.engines.registry import ENGINES, require_engine
from early_exit.handler.errors import ArchiveError
from early_exit.handler.exits.plan import build_heads, load_plan, save_plan
from early_exit.handler.torchserve.continuous_batching import SERVER_SETTINGS

_CREATED = "01/01/1980 00:00:00"
CONFIG_FILE = "model-config.yaml"


@dataclass(frozen=True)
class ArchiveRequest:
    """What `ee-archive` was asked for."""

    source: str
    to: Path
    plan: Path | None = None
    version: str | None = None
    """By default one above the source's version."""
    model_name: str | None = None
    weights: Path | None = None
    input_shape: tuple[int, ...] | None = None
    """Of one item; by default what the handler makes of the sample request."""
    inputs: tuple[InputSpec, ...] = ()
    """Instead of a shape, for a model with several inputs or with integers."""
    handler: str | None = None
    """For a factory or .pt2: a file or the name of a built-in handler."""
    extra_files: Sequence[Path] = field(default_factory=tuple)
    config: Path | None = None
    """Replaces the source's model-config.yaml."""
    engine: str | None = None
    """Written into model-config.yaml, its only owner: an archive without a plan is executed by an engine too."""
    calibrate: Path | None = None
    """Folder with recorded request bytes, for an engine that is made from them."""
    request: Path | None = None
    """Body of a typical request."""
    strategy: Strategy | None = None
    """What the class of an image is, for a detector; by default its most confident object."""
    pedestrian: int = PEDESTRIAN
    """Their label, for a detector."""


def build_archive(asked: ArchiveRequest, log: Callable[[str], None] = lambda line: None) -> Path:
    """Build, validate and publish an archive; return its path.

    Args:
        asked: what is wanted.
        log: told what the user should know about the archive.

    Raises:
        EarlyExitError: the source, the plan or the configuration cannot be used, or another archive has the name;
            nothing is published.
    """
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=3, desc="export", unit="step", disable=None) as progress:
        layout = ArchiveLayout(Path(scratch) / "archive")
        layout.root.mkdir()
        original, backbone = _unpack_source(asked, layout)
        _advance(progress, "fill")
        request = _sample_request(asked, layout, original, backbone.description)
        if request is None:
            log("no sample request is known, so the handler's pre- and post-processing are not tried out; "
                "--request FILE gives one")
        _write_ours(asked, layout, original, backbone, request, log, Path(scratch))
        asked.to.mkdir(parents=True, exist_ok=True)
        manifest = json.loads(layout.manifest.read_text())["model"]
        target = asked.to / f"{manifest['modelName']}-{manifest['modelVersion']}.mar"
        weights = original["model"].get("serializedFile")
        kept = _set_aside(layout.root, weights, Path(scratch))
        with tempfile.TemporaryDirectory(dir=asked.to, prefix=".building-") as building:
            draft = Path(building) / target.name
            zip_folder(layout.root, draft)
            _advance(progress, "try out")
            try:
                validate(draft)
            except ArchiveError:
                if kept is None:
                    raise
                # A handler whose initialize() reads the weights itself needs them; then they are in twice.
                shutil.move(kept, layout.root / weights)
                zip_folder(layout.root, draft)
                validate(draft)
                log(f"the handler reads {weights} itself, so the archive holds the weights twice")
            publish(draft, target)
        progress.update()
    return target


def _advance(progress: Any, to: str) -> None:
    progress.update()
    progress.set_description(to)


def _unpack_source(asked: ArchiveRequest, layout: ArchiveLayout) -> tuple[dict[str, Any], Backbone]:
    """Lay out the user's files and return the manifest that their handler expects, and the backbone."""
    if asked.source.endswith(".mar"):
        extract(Path(asked.source), layout.root)
        if layout.original_manifest.exists():
            manifest: dict[str, Any] = json.loads(layout.original_manifest.read_text())
            current = json.loads(layout.manifest.read_text())["model"]
            manifest["model"] |= {key: current[key] for key in ("modelVersion", "configFile") if key in current}
            return manifest, load_backbone(layout.folder)
        manifest = json.loads(layout.manifest.read_text())
        return manifest, _backbone_of_mar(asked, layout, manifest)
    manifest = _manifest_for(asked, layout)
    if asked.source.endswith(".pt2"):
        return manifest, Backbone.from_program(load_program(Path(asked.source)))
    if ":" not in asked.source:
        raise ArchiveError(f"expected a .mar, a .pt2 or package.module:function, found {asked.source!r}")
    if asked.weights is None or (asked.input_shape is None and not asked.inputs):
        raise ArchiveError("a factory needs --weights FILE.safetensors|.pth, and --input-shape, such as 3,224,224, or "
                           "an --input NAME:DTYPE:SHAPE for each input")
    model = model_from_factory(asked.source, asked.weights)
    if is_detector(model):
        raise ArchiveError("what a detector does cannot all be exported: give a .mar with its model file")
    return manifest, _exported(model, asked)


def _backbone_of_mar(asked: ArchiveRequest, layout: ArchiveLayout, manifest: dict[str, Any]) -> Backbone:
    model = eager_model(layout.root, manifest)
    if is_detector(model):
        return backbone_of_detector(model, asked.input_shape, asked.strategy, asked.pedestrian,
                                    manifest["model"]["modelFile"])
    if asked.strategy is not None:
        raise ArchiveError(f"{type(model).__name__} is no detector of torchvision, so it has no --strategy")
    if asked.input_shape is not None or asked.inputs:
        return _exported(model, asked)
    if asked.request is not None:
        return Backbone.from_module(model, *model_input(layout.root, manifest, asked.request.read_bytes()))
    return Backbone.from_module(model, *image_input(layout.root, manifest))


def _exported(model: nn.Module, asked: ArchiveRequest) -> Backbone:
    if asked.inputs:
        return Backbone.from_inputs(model, asked.inputs)
    return Backbone.from_module(model, asked.input_shape or ())


def _manifest_for(asked: ArchiveRequest, layout: ArchiveLayout) -> dict[str, Any]:
    """Copy the files given for a factory or .pt2 and return a manifest for their handler."""
    if asked.handler is None or asked.model_name is None:
        raise ArchiveError("a factory or .pt2 needs --handler (a file, or a built-in such as image_classifier), which "
                           "does pre- and post-processing, and --model-name")
    files = [*asked.extra_files, *([Path(asked.handler)] if asked.handler.endswith(".py") else [])]
    for file in files:
        if not file.is_file():
            raise ArchiveError(f"no such file: {file}")
        shutil.copyfile(file, layout.root / file.name)
    # 'modelFile' makes TorchServe's base handler ask for an eager model, which it is given.
    return {"runtime": "python", "model": {"modelName": asked.model_name, "handler": Path(asked.handler).name,
                                           "modelFile": "exported.py"}}


def _write_ours(asked: ArchiveRequest, layout: ArchiveLayout, original: dict[str, Any], backbone: Backbone,
                request: bytes | None, log: Callable[[str], None], scratch: Path) -> None:
    """Replace everything of ours in the layout: handler code, backbone, plan, manifests, configuration."""
    config = asked.config or _existing(layout.root, original["model"].get("configFile"))
    configuration, engine = _configuration(config, asked.engine, log)
    pieces = scratch / PIECES
    if ENGINES[engine].needs_calibration:
        _keep_or_quantize(asked, engine, layout, original, backbone, pieces, log)
    shutil.rmtree(layout.folder, ignore_errors=True)
    shutil.copytree(early_exit.handler.__path__[0], layout.folder / "handler", ignore=_all_but_python)
    backbone.save(layout.folder)
    if pieces.exists():
        shutil.move(pieces, layout.folder / PIECES)
    if request is not None:
        layout.sample_request.write_bytes(request)
    if asked.plan is not None:
        plan, tensors = load_plan(asked.plan)
        require_engine(plan.engine, ENGINES[engine].identity(layout.folder))
        save_plan(layout.folder, plan, build_heads(plan, tensors, backbone.description))
    layout.original_manifest.write_text(json.dumps(original, indent=1, sort_keys=True))
    has_config = config is not None or asked.engine is not None
    if has_config:
        (layout.root / CONFIG_FILE).write_text(configuration)
    layout.manifest.parent.mkdir(exist_ok=True)
    layout.manifest.write_text(_manifest(asked, original, has_config=has_config))


def _all_but_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names
            if name == "__pycache__" or not (name.endswith(".py") or Path(folder, name).is_dir())]


def _keep_or_quantize(asked: ArchiveRequest, engine: str, layout: ArchiveLayout, original: dict[str, Any],
                      backbone: Backbone, pieces: Path, log: Callable[[str], None]) -> None:
    """Put the source's quantized pieces aside, which a plan may belong to, or make new ones where that is asked for."""
    if asked.calibrate is not None:
        quantize(backbone, recorded_inputs(asked.calibrate, layout, original, backbone), pieces.parent, log)
    elif (layout.folder / PIECES).exists():
        shutil.move(layout.folder / PIECES, pieces)
    else:
        raise ArchiveError(f"the engine {engine} is made from recorded requests: pass --calibrate RECORDS, a folder "
                           "that was recorded with 'early_exit: {keep_requests: true}' in model-config.yaml")


def _configuration(config: Path | None, engine: str | None, log: Callable[[str], None]) -> tuple[str, str]:
    """Return the text of a valid model-config.yaml, and the engine that it names: the given one, with the engine where
    one is asked for and with TorchServe set as early answers need it."""
    try:
        text = config.read_text() if config else ""
        content = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise ArchiveError(f"cannot read the configuration {config}: {error}") from error
    serving = ServingConfig.from_model_config(content)
    changed = dict(content or {})
    if engine is not None:
        changed["early_exit"] = {**(changed.get("early_exit") or {}), "engine": engine}
        serving = ServingConfig.from_model_config(changed)
    needed = {name: value for name, value in SERVER_SETTINGS.items() if changed.get(name) != value}
    if serving.answers == EARLY and needed:
        changed |= needed
        log("early answers need TorchServe's continuous batching with one worker: the archive's model-config.yaml says "
            + ", ".join(f"{name}: {str(value).lower()}" for name, value in needed.items()))
    return text if changed == (content or {}) else yaml.safe_dump(changed, sort_keys=False), serving.engine


def _manifest(asked: ArchiveRequest, original: dict[str, Any], *, has_config: bool) -> str:
    from model_archiver.manifest_components.manifest import Manifest
    from model_archiver.manifest_components.model import Model

    model = original["model"]
    described = Model(
        model_name=asked.model_name or model["modelName"], serialized_file=None, handler=HANDLER,
        model_version=asked.version or _next_version(model.get("modelVersion")),
        requirements_file=model.get("requirementsFile"), config_file=CONFIG_FILE if has_config else None)
    manifest = Manifest("python", described).manifest_dict
    # The clock must not change the bytes of an archive.
    manifest["createdOn"] = _CREATED
    return json.dumps(manifest, indent=1, sort_keys=True)


def _next_version(version: str | None) -> str:
    if version is None:
        return "1.0"
    try:
        return f"{int(float(version)) + 1}.0"
    except ValueError:
        raise ArchiveError(f"the source has version {version!r}, which cannot be counted up: pass --version") from None


def _existing(folder: Path, name: str | None) -> Path | None:
    return folder / name if name else None


def _set_aside(root: Path, weights: str | None, scratch: Path) -> Path | None:
    """Move the source's weights out of the archive: the exported backbone has them already."""
    if not weights or not (root / weights).exists():
        return None
    aside = scratch / "weights"
    shutil.move(root / weights, aside)
    return aside


def _sample_request(asked: ArchiveRequest, layout: ArchiveLayout, original: dict[str, Any],
                    backbone: BackboneDescription) -> bytes | None:
    """Return a request that reaches the model with the right shape: the user's, the source's, or an image."""
    if asked.request is not None:
        return asked.request.read_bytes()
    if layout.sample_request.exists():
        return layout.sample_request.read_bytes()
    if len(backbone.inputs) > 1 or not backbone.inputs[0].dtype.startswith("float"):
        return None
    image = sample_image(backbone.input_shape[-1])
    try:
        shape, _ = model_input(layout.root, original, image)
    except ArchiveError:  # not a handler of images: the probe must do
        return None
    return image if shape == backbone.input_shape else None
