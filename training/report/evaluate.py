"""The evaluation of a finished run by `ee-train report`, from the folder of the run and the archive."""

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
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import engine_of
from early_exit.handler.errors import ArchiveError, RecordError
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan, build_heads, load_plan
from early_exit.handler.exits.policy import NEVER
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.planning.choose import choose, path_to_certify
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.report.latency import Latency, devices, latencies
from early_exit.training.report.ltma import expected_ltma, ltma
from early_exit.training.report.performance import Curve, Setting, curve, setting
from early_exit.training.report.scripted_model import ScriptedModel
from early_exit.training.report.summary import HeadReport, RunReport, flops_of, guarantee, make_report
from early_exit.training.selection.simulation import OperatingPoint, outcome
from early_exit.training.selection.thresholds import confidence_levels

BATCH_SIZES = (1, 8, 32)


@dataclass(frozen=True)
class Resources:
    """The resources that the model needs, without exits or with them."""

    flops: float
    """The mean FLOPs of a request."""
    parameters: int
    size_bytes: int
    """The bytes of parameters and buffers."""
    ltma_bytes: float
    """The mean live tensor memory allocations of a request that is served alone."""


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run; hit rates, agreement, accuracy and costs are those on its certify part."""

    summary: RunReport
    """The report of the run itself."""
    frontier: tuple[Setting, ...]
    """Settings from "never exit" to aggressive: of the deployed exits or, if none pay, of the exits tried on *tune*."""
    curves: tuple[Curve, ...]
    """The figures of every head alone, at all thresholds."""
    plain: Resources
    """The resources that the backbone needs without exits."""
    with_exits: Resources
    """The resources that the backbone needs with the exits of the plan."""
    latencies: tuple[Latency, ...]
    asked: dict[str, Any]
    """The options of the run."""

    def to_json(self) -> dict[str, Any]:
        """Return evaluation.json."""
        summary, plan = self.summary, self.summary.plan
        return {"model": summary.model, "backbone": plan.backbone, "guarantee": guarantee(plan),
                "measure": plan.measure, "batch_size": plan.batch_size, "records": dict(summary.records),
                "deployed": asdict(summary.deployed), "exits": [asdict(exit) for exit in summary.exits],
                "frontier": [asdict(point) for point in self.frontier],
                "curves": [asdict(line) for line in self.curves], "plain": asdict(self.plain),
                "with_exits": asdict(self.with_exits),
                "latencies": [asdict(latency) for latency in self.latencies],
                "heads": [asdict(head) for head in summary.heads], "left_out": list(summary.left_out),
                "skipped": dict(summary.skipped), "asked": self.asked}


def evaluate(run: RunPaths, archive: Path | None = None, *, max_seconds: float = 60.0,
             log: Callable[[str], None] = lambda line: None) -> Evaluation:
    """Evaluate a finished run; nothing is trained.

    Args:
        run: the folder of the run.
        archive: the archive that was recorded, if it has moved since the run started.
        max_seconds: the time for the latencies on each device.
        log: receives a line before each long step.

    Raises:
        RecordError: the folder is not that of a finished run.
        ArchiveError: the archive does not exist, or has another backbone.
    """
    _require_finished(run)
    inputs, reported = json.loads(run.inputs.read_text()), json.loads(run.report_json.read_text())
    plan, tensors = load_plan(run.plan)
    mar = _archive(run, inputs, archive)
    predictions, options = HeadPredictions.load(run.predictions), TrainingOptions.to_choose_with(inputs["options"])
    path = path_to_certify(predictions, options) if options.thresholds == "certified" else None
    point = choose(predictions, options, path)
    _require_planned(run, plan, point, predictions)
    certify = predictions.certify
    taken = outcome(point, certify.candidates).exit
    if path is None:
        path = [OperatingPoint(point.layers, (level,) * len(point.layers)) for level in (NEVER, *confidence_levels())]
    head_reports = [HeadReport(**head) for head in reported["heads"]]
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        extract(mar, layout.root)
        backbone = load_backbone(layout.folder)
        heads = build_heads(plan, tensors, backbone.description)
        summary = make_report(reported["model"], reported["records"], plan, point, predictions, head_reports,
                              reported["left_out"], reported.get("skipped", {}), backbone.description)
        plain, with_exits = _resources(backbone, plan, heads, taken, summary.deployed.flops)
        engine, timed = engine_of(plan.engine), list[Latency]()
        for device in [device for device in devices() if device == "cpu" or engine.on_gpu]:
            log(f"timing batches on {device}, for {max_seconds:.0f} s at most")
            here = backbone if device == "cpu" else load_backbone(layout.folder, device)
            timed += latencies(engine.unsplit(here), ScriptedModel(here, plan, heads, device), taken,
                               sorted({*BATCH_SIZES, options.batch_size}), device, max_seconds=max_seconds)
    flops = flops_of(head_reports, backbone.description)
    return Evaluation(
        summary=summary, frontier=tuple(setting(point, certify, flops) for point in path),
        curves=tuple(curve(layer, index, certify) for index, layer in enumerate(predictions.layers)),
        plain=plain, with_exits=with_exits, latencies=tuple(timed), asked=inputs["options"])


def _require_finished(run: RunPaths) -> None:
    for path in (run.inputs, run.predictions, run.plan, run.report_json):
        if not path.exists():
            raise RecordError(f"{run.root} is not the folder of a finished run, {path.name} is missing: pass the "
                              "folder that 'ee-train --to' was given, and let that run finish")


def _require_planned(run: RunPaths, plan: ExitPlan, point: OperatingPoint, predictions: HeadPredictions) -> None:
    """Check that the plan follows from the run's predictions."""
    planned = [(planned.layer, planned.threshold) for planned in plan.exits]
    if planned != [(predictions.layers[index], threshold) for index, threshold in zip(point.layers, point.thresholds)]:
        raise RecordError(f"{run.plan} does not follow from the figures of its run: another version of this software "
                          "wrote it, or it was changed. Train again into another folder")


def _archive(run: RunPaths, inputs: dict[str, Any], given: Path | None) -> Path:
    """Return the path of the archive that the run was made for."""
    remembered = inputs.get("archive")
    mar = given or (Path(remembered) if remembered else None)
    if mar is None or not mar.exists():
        raise ArchiveError(f"the archive of {run.root} is not at {mar or 'a known place'}, and memory and time cannot "
                           "be measured without it: pass its path with --archive X.mar")
    description = read_archive(mar).description
    if description.sha256 != inputs["backbone"]:
        raise ArchiveError(f"{mar} has the backbone {description.sha256[:12]}, but {run.root} is a run of "
                           f"{inputs['backbone'][:12]}: pass the archive that was recorded with --archive X.mar")
    return mar


def _resources(backbone: Backbone, plan: ExitPlan, heads: Mapping[str, Head], taken: Tensor,
               flops_ratio: float) -> tuple[Resources, Resources]:
    """Return the resources that the model needs without exits and with them."""
    held = [*backbone.parameters(), *backbone.graph.buffers()]
    parameters, size = sum(p.numel() for p in backbone.parameters()), sum(tensor.nbytes for tensor in held)
    flops = backbone.description.flops
    whole = engine_of(plan.engine).unsplit(backbone)
    plain = Resources(flops, parameters, size, ltma(whole, backbone.probe))
    in_heads = [p for head in heads.values() for p in head.parameters()]
    return plain, Resources(
        flops * flops_ratio, parameters + sum(p.numel() for p in in_heads), size + sum(p.nbytes for p in in_heads),
        expected_ltma(ScriptedModel(backbone, plan, heads), taken))
