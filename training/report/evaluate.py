"""What a finished run is worth: everything that `ee-train report` tells, from the folder of the run and the archive."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import engine_of
from early_exit.handler.errors import ArchiveError, RecordError
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan, build_heads, load_plan
from early_exit.training.costs.cost import Costs, flop_costs
from early_exit.training.data.dataset import Part
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.planning.choose import choose, settings
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.report.latency import Latency, devices, latencies
from early_exit.training.report.ltma import expected_ltma, ltma
from early_exit.training.report.performance import Curve, Performance, Setting, curve, exit_performances, setting
from early_exit.training.report.scripted_model import ScriptedModel
from early_exit.training.report.summary import guarantee
from early_exit.training.selection.thresholds import NEVER, OperatingPoint, confidence_levels, outcome

BATCH_SIZES = (1, 8, 32)


@dataclass(frozen=True)
class EvaluatedExit:
    """One exit of the plan, on the certify part."""

    layer: str
    cost: float
    """Fraction of the backbone's FLOPs spent before its head."""
    head: str
    """Its architecture, in words."""
    threshold: float
    temperature: float
    alone: Performance
    """As if it were the only exit."""
    together: Performance
    """After the exits before it."""


@dataclass(frozen=True)
class Resources:
    """What the model needs, without exits or with them."""

    flops: float
    """Mean of a request."""
    parameters: int
    size_bytes: int
    """Of parameters and buffers."""
    ltma_bytes: float
    """Live tensor memory allocations: mean of a request that is served alone."""


@dataclass(frozen=True)
class Evaluation:
    """The worth of a run; hit rates, agreement, accuracy and costs are those on its certify part."""

    model: str
    backbone: str
    """sha256."""
    guarantee: str
    """The certificate in words."""
    measure: str
    """What the costs of settings are: 'flops' or 'seconds', in batches of `batch_size`."""
    batch_size: int
    records: dict[str, int]
    """By part."""
    deployed: Setting
    exits: tuple[EvaluatedExit, ...]
    frontier: tuple[Setting, ...]
    """From "never exit" to aggressive: the deployed exits, or where none pay those that do on *tune*."""
    curves: tuple[Curve, ...]
    """Of every head."""
    plain: Resources
    with_exits: Resources
    latencies: tuple[Latency, ...]
    heads: tuple[dict[str, Any], ...]
    """Of the run's report: all that were trained."""
    left_out: tuple[str, ...]
    """Candidates without a head, and why."""
    asked: dict[str, Any]
    """The options of the run."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(run: RunPaths, archive: Path | None = None, *, max_seconds: float = 60.0,
             log: Callable[[str], None] = lambda line: None) -> Evaluation:
    """Evaluate a finished run; nothing is trained.

    Args:
        run: its folder.
        archive: the archive that was recorded, where it is not where it was when the run started.
        max_seconds: for the latencies on each device.
        log: told what takes long.

    Raises:
        RecordError: the folder is not that of a finished run.
        ArchiveError: the archive is not there, or has another backbone.
    """
    _require_finished(run)
    inputs, report = json.loads(run.inputs.read_text()), json.loads(run.report_json.read_text())
    plan, tensors = load_plan(run.plan)
    mar = _archive(run, inputs, archive)
    judged, options = HeadPredictions.load(run.judged), TrainingOptions.to_choose_with(inputs["options"])
    path = settings(judged, options) if options.thresholds == "certified" else None
    choice = choose(judged, options, path)
    planned = tuple(one.threshold for one in plan.exits)
    if (choice.thresholds, tuple(judged.layers[index] for index in choice.layers)) != (
            planned, tuple(one.layer for one in plan.exits)):
        raise RecordError(f"{run.plan} is not what the run's own figures lead to: another version of this software "
                          "wrote it, or it was changed. Train again into another folder")
    said = judged.parts[Part.CERTIFY]
    taken = outcome(choice, said.candidates).exit
    if path is None:
        path = [OperatingPoint(choice.layers, (level,) * len(choice.layers)) for level in (NEVER, *confidence_levels())]
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        extract(mar, layout.root)
        backbone = load_backbone(layout.folder)
        heads = build_heads(plan, tensors, backbone.description)
        flops = _flops(judged, report["heads"], backbone.description)
        deployed = setting(choice, said, flops)
        plain, with_exits = _resources(backbone, plan, heads, taken, deployed.flops)
        timed: list[Latency] = []
        for device in [one for one in devices() if one == "cpu" or engine_of(plan.engine).on_gpu]:
            log(f"timing batches on {device}, for {max_seconds:.0f} s at most")
            here = backbone if device == "cpu" else load_backbone(layout.folder, device)
            timed += latencies(engine_of(plan.engine).unsplit(here), ScriptedModel(here, plan, heads, device), taken,
                               sorted({*BATCH_SIZES, options.batch_size}), device, max_seconds=max_seconds)
    exits = tuple(
        EvaluatedExit(one.layer, one.cost, one.head.in_words(), one.threshold, one.policy.temperature, *found)
        for one, found in zip(plan.exits, exit_performances(choice, said)))
    return Evaluation(
        model=report["model"], backbone=plan.backbone, guarantee=guarantee(plan), measure=plan.measure,
        batch_size=plan.batch_size, records=report["records"], deployed=deployed, exits=exits,
        frontier=tuple(setting(one, said, flops) for one in path),
        curves=tuple(curve(layer, index, said) for index, layer in enumerate(judged.layers)),
        plain=plain, with_exits=with_exits, latencies=tuple(timed), heads=tuple(report["heads"]),
        left_out=tuple(report["left_out"]), asked=inputs["options"])


def _require_finished(run: RunPaths) -> None:
    for path in (run.inputs, run.judged, run.plan, run.report_json):
        if not path.exists():
            raise RecordError(f"{run.root} is not the folder of a finished run, {path.name} is missing: pass what "
                              "'ee-train --to' was given, and let it finish")


def _archive(run: RunPaths, inputs: dict[str, Any], given: Path | None) -> Path:
    """Return where the archive is that the run was made for."""
    remembered = inputs.get("archive")
    mar = given or (Path(remembered) if remembered else None)
    if mar is None or not mar.exists():
        raise ArchiveError(f"the archive of {run.root} is not at {mar or 'a place that is known'}: say with "
                           "--archive X.mar where it is, memory and time cannot be measured without it")
    description = read_archive(mar).description
    if description.sha256 != inputs["backbone"]:
        raise ArchiveError(f"{mar} has the backbone {description.sha256[:12]}, but {run.root} is a run of "
                           f"{inputs['backbone'][:12]}: pass the archive that was recorded with --archive X.mar")
    return mar


def _flops(judged: HeadPredictions, heads: list[dict[str, Any]], backbone: BackboneDescription) -> Costs:
    of_head = {head["layer"]: head["flops_ratio"] for head in heads}
    return flop_costs([backbone.layer(path) for path in judged.layers], [of_head[path] for path in judged.layers])


def _resources(backbone: Backbone, plan: ExitPlan, heads: Mapping[str, Head], taken: Tensor,
               flops_ratio: float) -> tuple[Resources, Resources]:
    """Return what the model needs without exits and with them."""
    held = [*backbone.parameters(), *backbone.graph.buffers()]
    parameters, size = sum(p.numel() for p in backbone.parameters()), sum(tensor.nbytes for tensor in held)
    flops = backbone.description.flops
    whole = engine_of(plan.engine).unsplit(backbone)
    plain = Resources(flops, parameters, size, ltma(whole, backbone.description.probe_inputs()))
    in_heads = [p for head in heads.values() for p in head.parameters()]
    return plain, Resources(
        flops * flops_ratio, parameters + sum(p.numel() for p in in_heads), size + sum(p.nbytes for p in in_heads),
        expected_ltma(ScriptedModel(backbone, plan, heads), taken))
