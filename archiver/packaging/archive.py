"""Writes an early-exit .mar: self-contained, the same bytes for the same input, and compared before it is published."""

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
from early_exit.archiver.packaging.learn import learn
from early_exit.archiver.packaging.manifest import manifest_text
from early_exit.archiver.packaging.publish import publish, zip_folder
from early_exit.archiver.packaging.quantize import quantize, recorded_inputs
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.source import Source, unpack_source
from early_exit.archiver.packaging.tryout.child import launcher
from early_exit.archiver.packaging.tryout.trials import check
from early_exit.handler.archive_layout import COMPILED, DESCRIPTION_FILE, HEADS_FILE, ArchiveLayout, read_manifest
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.config import ServingConfig
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.openvino import PIECES
from early_exit.handler.engines.registry import ENGINES, require_engine
from early_exit.handler.errors import ArchiveError, Unsupported
from early_exit.handler.exits.plan import build_heads, load_plan, write_plan
from early_exit.handler.user_handler.description import HandlerDescription, Loading
from early_exit.handler.user_handler.traffic import digests_of, users_files
from early_exit.training.data.skipped import Skipped
from early_exit.training.data.traffic import traffic_in


def build_archive(request: ArchiveRequest, log: Callable[[str], None] = lambda line: None,
                  skipped: Skipped | None = None) -> Path:
    """Build, compare and publish an archive; return its path.

    Args:
        request: the archive to build.
        log: receives lines that the user should know about the archive.
        skipped: counts recorded requests that could not be used to calibrate the archive.

    Raises:
        EarlyExitError: the source, the plan or the configuration cannot be used, the archive does not answer as its
            source does, or another archive has the name; nothing is published.
    """
    with tempfile.TemporaryDirectory() as scratch, launcher(), \
            tqdm(total=3, desc="export", unit="step", disable=None) as progress:
        layout, aside = ArchiveLayout(Path(scratch) / "archive"), Path(scratch) / "aside"
        layout.root.mkdir()
        aside.mkdir()
        source = unpack_source(request, layout)
        given = request.config or (layout.root / source.configuration if source.configuration else None)
        configuration = read_configuration(given, request.engine, log)
        learn(request, layout, source, aside, log)
        _advance(progress, "fill")
        _write_root(request, layout, source, configuration)
        _write_own_folder(request, layout, source, configuration.serving, aside, log, skipped or Skipped())
        _advance(progress, "try out")
        request.to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=request.to, prefix=".building-") as building:
            draft = Path(building) / _file_name(layout)
            _zip_and_check(layout, draft, source, aside, log)
            target = request.to / draft.name
            publish(draft, target)
        progress.update()
    return target


def _advance(progress: Any, to: str) -> None:
    progress.update()
    progress.set_description(to)


def _write_own_folder(request: ArchiveRequest, layout: ArchiveLayout, source: Source, serving: ServingConfig,
                      aside: Path, log: Callable[[str], None], skipped: Skipped) -> None:
    """Replace the contents of the archive's own folder: the handler code, the engine's pieces and the plan."""
    backbone = load_backbone(layout.folder)
    if ENGINES[serving.engine].needs_calibration:
        _keep_or_quantize(request, serving.engine, layout, source, backbone, aside, log, skipped)
    elif request.calibrate is not None:
        raise ArchiveError(f"--calibrate would have no effect on the engine {serving.engine}, which is not made from "
                           "records: pass --engine openvino-int8, too")
    traffic, kept = traffic_in(layout, backbone.description), aside / "kept"
    layout.folder.rename(kept)
    shutil.copytree(early_exit.handler.__path__[0], layout.folder / "handler", ignore=_all_but_python)
    backbone.save(layout.folder)
    for file in (layout.original_manifest, layout.samples, layout.answers, layout.handler_description):
        if (kept / file.name).exists():
            shutil.move(kept / file.name, file)
    if (aside / PIECES).exists():
        shutil.move(aside / PIECES, layout.folder / PIECES)
    if request.plan is not None:
        plan, tensors = load_plan(request.plan)
        require_engine(plan.engine, ENGINES[serving.engine].identity(layout.folder))
        if plan.certificate and not plan.is_certified_for(traffic):
            log("the plan's certificate is about other traffic: the handler, its files or its configuration differ "
                "from those of the archive that the plan was trained for. The new archive answers every request in "
                "full until it has a plan from records of its own")
        elif plan.certificate and plan.exits and serving.exits and not serving.sampling(has_exits=True):
            log("nothing watches the plan's certificate, because early_exit.sampling_rate is 0 and so no request is "
                "compared with the whole model: if the traffic changes, nobody notices, and ee-watch renews nothing. "
                "Leave sampling_rate out, or set it above 0")
        build_heads(plan, tensors, backbone.description)  # which checks that they fit this backbone
        write_plan(layout.folder, plan, request.plan.with_name(HEADS_FILE).read_bytes())


def _keep_or_quantize(request: ArchiveRequest, engine: str, layout: ArchiveLayout, source: Source, backbone: Backbone,
                      aside: Path, log: Callable[[str], None], skipped: Skipped) -> None:
    """Keep the source's quantized pieces, to which a plan may belong, or make new ones if the request asks for them."""
    if request.calibrate is not None:
        inputs = recorded_inputs(request.calibrate, layout, source.manifest, backbone, skipped, log)
        quantize(backbone, inputs, aside, log)
    elif (layout.folder / PIECES).exists():
        shutil.move(layout.folder / PIECES, aside / PIECES)
    else:
        raise ArchiveError(f"the engine {engine} is made from recorded requests: pass --calibrate RECORDS, a folder "
                           "that was recorded with 'early_exit: {keep_requests: true}' in model-config.yaml")


def _all_but_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names
            if name == COMPILED or not (name.endswith(".py") or Path(folder, name).is_dir())]


def _write_root(request: ArchiveRequest, layout: ArchiveLayout, source: Source, configuration: Configuration) -> None:
    """Replace the configuration and the manifest in the archive's root, and note the user's other files there."""
    layout.original_manifest.write_text(json.dumps(source.manifest, indent=1, sort_keys=True))
    config_file = None if configuration.text is None else source.configuration or _free_name(layout.root)
    if config_file is not None and configuration.text is not None:
        (layout.root / config_file).write_text(configuration.text)
    layout.manifest.parent.mkdir(exist_ok=True)
    layout.manifest.write_text(manifest_text(
        source.manifest, name=request.model_name or source.name, version=request.version, config_file=config_file,
        replaces=source.version))
    description = HandlerDescription.load(layout.handler_description)
    names = users_files(layout.root, source.manifest, config_file,
                        with_weights=description.loading is not Loading.GIVEN)
    replace(description, files=digests_of(layout.root, names)).save(layout.handler_description)


def _free_name(folder: Path) -> str:
    """Return a name for the archive's configuration that no file of the user has: one that the manifest does not name
    is read by the user's handler."""
    name = CONFIG_FILE
    while (folder / name).exists():
        name = f"early-exit-{name}"
    return name


def _file_name(layout: ArchiveLayout) -> str:
    manifest = read_manifest(layout.manifest)["model"]
    return f"{manifest['modelName']}-{manifest['modelVersion']}.mar"


def _zip_and_check(layout: ArchiveLayout, draft: Path, source: Source, aside: Path, log: Callable[[str], None]) -> None:
    """Zip a folder and compare the archive's answers; find out by trying whether the user's own model must be loaded.

    Raises:
        ArchiveError: the archive does not answer as its source does, however the model is loaded.
    """
    layout.sample_answers.unlink(missing_ok=True)
    answers = _checked(layout, draft, source, aside, log)
    if answers:  # ee-roll recognises the archive by these answers if it cannot probe
        layout.sample_answers.write_text(json.dumps(answers, indent=1, sort_keys=True))
        zip_folder(layout.root, draft)


def _checked(layout: ArchiveLayout, draft: Path, source: Source, aside: Path,
             log: Callable[[str], None]) -> dict[str, Any]:
    """Zip a folder, and return the archive's answers to its first sample, by the exit that gives them."""
    expected = layout.answers if layout.answers.exists() else None
    if source.is_ours:
        zip_folder(layout.root, draft)
        return check(draft, expected)
    description = HandlerDescription.load(layout.handler_description)
    ways = list(Loading)[list(Loading).index(description.loading):] if source.has_model else [Loading.GIVEN]
    weights = layout.root / source.weights if source.weights else None
    # Weights that stay are a file of the user like any other: the handler may read more than the weights there.
    digests = digests_of(layout.root, [source.weights]) if source.weights else {}
    for way in ways:
        files = {**(description.files or {}), **({} if way is Loading.GIVEN else digests)}
        replace(description, loading=way, files=files).save(layout.handler_description)
        # The user's own weights are left out if they are not needed: the exported backbone has them already.
        zip_folder(layout.root, draft, without=weights if way is Loading.GIVEN else None)
        try:
            answers = check(draft, expected)
        except ArchiveError as error:
            if way is ways[-1]:
                raise _for_want_of_outputs(error, layout) from error
            continue
        if way is Loading.GIVEN:
            if weights is not None:
                weights.unlink()
        elif weights is not None:
            log(f"the handler reads {weights.name} itself, so the archive holds the weights twice")
        if way is Loading.KEPT:
            log("the handler asks its model for more than its answers, so each worker keeps the original model too")
        return answers
    raise AssertionError("the last way is returned or raised")


def _for_want_of_outputs(error: ArchiveError, layout: ArchiveLayout) -> ArchiveError:
    """Return the error of an archive that answers differently from its source; it names the model's further outputs."""
    beside = BackboneDescription.load(layout.folder / DESCRIPTION_FILE).output.beside
    if not beside:
        return error
    return ArchiveError(f"{error}\nThe model returns more than its scores ({', '.join(beside)}), but an exit returns "
                        "scores only: a handler whose answers need the other outputs cannot have exits",
                        Unsupported.SEVERAL_SCORES)
