"""Writes an early-exit .mar: self-contained, the same bytes for the same input, tried out before anyone sees it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import early_exit.handler
from early_exit.archiver.packaging.configuration import CONFIG_FILE, Configuration, read_configuration
from early_exit.archiver.packaging.manifest import manifest_text
from early_exit.archiver.packaging.publish import publish, zip_folder
from early_exit.archiver.packaging.quantize import quantize, recorded_inputs
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.sample import probed_by_sample, sample_request
from early_exit.archiver.packaging.sources.source import Source, unpack_source
from early_exit.archiver.packaging.validate import validate
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.engines.openvino import PIECES
from early_exit.handler.engines.registry import ENGINES, require_engine
from early_exit.handler.errors import ArchiveError
from early_exit.handler.exits.plan import build_heads, load_plan, save_plan


def build_archive(request: ArchiveRequest, log: Callable[[str], None] = lambda line: None) -> Path:
    """Build, validate and publish an archive; return its path.

    Args:
        request: what is wanted.
        log: called with a line about what the user should know of the archive.

    Raises:
        EarlyExitError: the source, the plan or the configuration cannot be used, or another archive has the name;
            nothing is published.
    """
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=3, desc="export", unit="step", disable=None) as progress:
        layout, aside = ArchiveLayout(Path(scratch) / "archive"), Path(scratch) / "aside"
        layout.root.mkdir()
        aside.mkdir()
        source = unpack_source(request, layout)
        _advance(progress, "fill")
        sample = sample_request(request.request, layout, source.manifest, source.backbone.description)
        if sample is None:
            log("no sample request is known, so the handler's pre- and post-processing are not tried out; "
                "--request FILE gives one")
        source = replace(source, backbone=probed_by_sample(source.backbone, layout, source.manifest, sample))
        configuration = read_configuration(request.config or source.configuration(layout), request.engine, log)
        _write_own_folder(request, layout, source, configuration.engine, sample, aside, log)
        _write_root(request, layout, source, configuration)
        _advance(progress, "try out")
        request.to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=request.to, prefix=".building-") as building:
            draft = Path(building) / _file_name(layout)
            _zip_and_validate(layout.root, draft, source.weights, aside, log)
            target = request.to / draft.name
            publish(draft, target)
        progress.update()
    return target


def _advance(progress: Any, to: str) -> None:
    progress.update()
    progress.set_description(to)


def _write_own_folder(request: ArchiveRequest, layout: ArchiveLayout, source: Source, engine: str,
                      sample: bytes | None, aside: Path, log: Callable[[str], None]) -> None:
    """Replace all that lies in the archive's own folder: handler code, backbone, engine's pieces, plan, sample."""
    backbone = source.backbone
    if ENGINES[engine].needs_calibration:
        _keep_or_quantize(request, engine, layout, source, aside, log)
    shutil.rmtree(layout.folder, ignore_errors=True)
    shutil.copytree(early_exit.handler.__path__[0], layout.folder / "handler", ignore=_all_but_python)
    backbone.save(layout.folder)
    if (aside / PIECES).exists():
        shutil.move(aside / PIECES, layout.folder / PIECES)
    if sample is not None:
        layout.sample_request.write_bytes(sample)
    if request.plan is not None:
        plan, tensors = load_plan(request.plan)
        require_engine(plan.engine, ENGINES[engine].identity(layout.folder))
        save_plan(layout.folder, plan, build_heads(plan, tensors, backbone.description))
    layout.original_manifest.write_text(json.dumps(source.manifest, indent=1, sort_keys=True))


def _keep_or_quantize(request: ArchiveRequest, engine: str, layout: ArchiveLayout, source: Source, aside: Path,
                      log: Callable[[str], None]) -> None:
    """Put the source's quantized pieces aside, which a plan may belong to, or make new ones where that is asked for."""
    if request.calibrate is not None:
        quantize(source.backbone, recorded_inputs(request.calibrate, layout, source.manifest, source.backbone), aside,
                 log)
    elif (layout.folder / PIECES).exists():
        shutil.move(layout.folder / PIECES, aside / PIECES)
    else:
        raise ArchiveError(f"the engine {engine} is made from recorded requests: pass --calibrate RECORDS, a folder "
                           "that was recorded with 'early_exit: {keep_requests: true}' in model-config.yaml")


def _all_but_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names
            if name == "__pycache__" or not (name.endswith(".py") or Path(folder, name).is_dir())]


def _write_root(request: ArchiveRequest, layout: ArchiveLayout, source: Source, configuration: Configuration) -> None:
    """Replace what TorchServe reads in the archive's root: configuration and manifest."""
    if configuration.text is not None:
        (layout.root / CONFIG_FILE).write_text(configuration.text)
    layout.manifest.parent.mkdir(exist_ok=True)
    layout.manifest.write_text(manifest_text(
        source.manifest, name=request.model_name, version=request.version,
        config_file=None if configuration.text is None else CONFIG_FILE))


def _file_name(layout: ArchiveLayout) -> str:
    manifest = json.loads(layout.manifest.read_text())["model"]
    return f"{manifest['modelName']}-{manifest['modelVersion']}.mar"


def _zip_and_validate(root: Path, draft: Path, weights: str | None, aside: Path, log: Callable[[str], None]) -> None:
    """Zip a folder and try the archive out, without the user's own weights if it can do without them: the exported
    backbone has them already."""
    if weights is None or not (root / weights).exists():
        zip_folder(root, draft)
        validate(draft)
        return
    shutil.move(root / weights, aside / "weights")
    zip_folder(root, draft)
    try:
        validate(draft)
    except ArchiveError:
        # A handler whose initialize() reads the weights itself needs them; then they are in twice.
        shutil.move(aside / "weights", root / weights)
        zip_folder(root, draft)
        validate(draft)
        log(f"the handler reads {weights} itself, so the archive holds the weights twice")
