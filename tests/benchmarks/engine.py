"""Exits on top of every engine: ResNet-50 at 224 px with scripted exits, 10/60/12 % after layers 1 to 3.

    python -m tests.benchmarks.engine --json FILE

CPU time of the process, one thread, all arms interleaved, medians of the ratios of 15 rounds, the same allocator in
all arms. Heads are real, untrained, and run; which rows leave is scripted. The ideal saves, for each row that leaves,
the time of the stages after its exit, as measured for full batches. At batch 1 a round is ten requests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision
from torch import Tensor

from early_exit.archiver.packaging.quantize import quantize
from early_exit.handler.allocator import restart_with_allocator, return_freed_memory
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES, INT8
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Stage, run_with_exits
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.training.costs.profiling import one_thread, profile_backbone
from tests.support.timing import interleaved, median_ratio

LAYERS = ("layer1.2", "layer2.3", "layer3.5")
LEAVERS = {1: (1, 6, 1, 2), 8: (1, 5, 1, 1), 32: (3, 19, 4, 6)}
"""By batch size: rows that leave after each layer, and those that reach the end; at batch 1 of ten requests."""
ROUNDS = 15
SPEC = HeadSpec(pool=4, widths=(64,))


def main() -> int:
    parser = argparse.ArgumentParser(description="Exits on top of every engine.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES), metavar="ENGINE",
                        help="to measure, besides eager (all of %(choices)s)")
    parser.add_argument("--batches", nargs="*", type=int, choices=LEAVERS, default=list(LEAVERS), metavar="SIZE")
    parser.add_argument("--resident", nargs=2, metavar=("FOLDER", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        print(resident_bytes(Path(options.resident[0]), options.resident[1]))
        return 0
    if options.json is None:
        parser.error("--json FILE is needed")
    restart_with_allocator()
    torch.manual_seed(0)
    engines = ["eager", *(name for name in options.engines if name != "eager")]
    with tempfile.TemporaryDirectory() as scratch, one_thread(), torch.no_grad():
        folder = Path(scratch)
        Backbone.from_module(torchvision.models.resnet50(weights=None).eval(), (3, 224, 224)).save(folder)
        resident = memory(folder)
        backbone = load_backbone(folder)
        if INT8 in engines:  # what is fast does not depend on the values
            quantize(backbone, (torch.randn(8, 3, 224, 224),), folder)
        cells: list[dict[str, Any]] = []
        for size in options.batches:
            cells += measure(backbone, size, engines)
            figures = summary(cells) | {"memory": resident, "cells": cells}
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


@dataclass
class Script:
    """Where each row that still travels leaves: the number of its exit, or that of the last stage."""

    remaining: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def leaves(self, number: int) -> Tensor:
        hits = self.remaining == number
        self.remaining = self.remaining[~hits]
        return hits


def with_exits(model: EarlyExitModel, script: Script) -> list[Stage]:
    """Return the model's stages with scripted decisions in place of its exits' own, which are made all the same."""
    def scripted(number: int, stage: Stage) -> Stage:
        if stage.exit is None:
            return stage
        decide = stage.exit.policy
        return replace(stage, exit=replace(stage.exit,
                                           policy=lambda logits: decide(logits) | script.leaves(number)))
    return [scripted(number, stage) for number, stage in enumerate(model.assembly.stages)]


def untrained_heads(backbone: Backbone, paths: Sequence[str] = LAYERS) -> dict[str, Head]:
    """Return a head for each of some layers."""
    layers = [backbone.description.layer(path) for path in paths]
    return {layer.path: Head(SPEC, layer.shape, backbone.description.n_classes).eval() for layer in layers}


def exiting_model(backbone: Backbone, engine: str, heads: Mapping[str, Head], thresholds: Sequence[float] = (),
                  control_rate: float = 0.0) -> EarlyExitModel:
    """Return a model with exits, which by default nobody leaves at."""
    layers = [backbone.description.layer(path) for path in heads]
    exits = tuple(PlannedExit(layer.path, SPEC, ConfidencePolicy(1.0, threshold), layer.cost, 0.001)
                  for layer, threshold in zip(layers, thresholds or [2.0] * len(layers)))
    plan = ExitPlan(backbone.description.sha256, "paper", exits, None, ENGINES[engine].identity(backbone.folder))
    return build_model(backbone, plan, heads, engine=engine, control_rate=control_rate).to(backbone.device)


def measure(backbone: Backbone, size: int, engines: list[str]) -> list[dict[str, Any]]:
    """Return a row for each engine, with and without exits."""
    n_calls = 10 if size == 1 else 1
    destinies = torch.repeat_interleave(torch.arange(4), torch.tensor(LEAVERS[size]))
    rounds = [(torch.randn(n_calls, size, 3, 224, 224), destinies[torch.randperm(len(destinies))].view(n_calls, size))
              for _ in range(3)]
    arms: dict[str, Any] = {}

    def unsplit(engine: str) -> Any:
        whole = ENGINES[engine].unsplit(backbone)
        return lambda item: [whole.forward(batch) for batch in item[0]]

    def exits(model: EarlyExitModel) -> Any:
        script = Script()
        stages = with_exits(model, script)

        def run(item: tuple[Tensor, Tensor]) -> None:
            for batch, script.remaining in zip(*item):
                run_with_exits((batch,), stages)
        return run

    for engine in engines:
        model = exiting_model(backbone, engine, untrained_heads(backbone))
        arms[f"{engine} unsplit"] = unsplit(engine)
        arms[f"{engine} none"] = lambda item, stages=model.assembly.stages: [
            run_with_exits((batch,), stages) for batch in item[0]]
        arms[f"{engine} 10/60/12"] = exits(model)
    seconds = interleaved(arms, [rounds[number % 3] for number in range(ROUNDS)])
    rows = []
    for engine in engines:
        ideal = ideal_saving(backbone, engine, size)
        for leave in ("none", "10/60/12"):
            taken = seconds[f"{engine} {leave}"]
            ratio = median_ratio(taken, seconds[f"{engine} unsplit"])
            rows.append({
                "batch": size, "engine": engine, "exits": leave, "ratio_to_same_engine": ratio,
                "ratio_to_eager": median_ratio(taken, seconds["eager unsplit"]),
                "share_of_ideal": (1 - ratio) / ideal if leave != "none" else None})
    return rows


def ideal_saving(backbone: Backbone, engine: str, size: int) -> float:
    """Return the share of the time of a full batch that comes after the exits of the rows that leave."""
    layers = [backbone.description.layer(path) for path in LAYERS]
    stages = torch.tensor(profile_backbone(backbone, layers, engine=engine, sizes=(size,)).stages).flatten()
    spent = stages.cumsum(0) / stages.sum()
    leavers = torch.tensor(LEAVERS[size], dtype=spent.dtype)
    return 1 - float(leavers @ spent / leavers.sum())


def memory(folder: Path) -> dict[str, float]:
    """Return the resident MB of a process with the plain exported backbone of a folder and of one with exits, and
    their ratio."""
    resident = {arm: int(subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.engine", "--resident", str(folder), arm], check=True,
        capture_output=True, text=True).stdout) for arm in ("plain", "exits")}
    return {"plain_mb": resident["plain"] / 1e6, "exits_mb": resident["exits"] / 1e6,
            "ratio": resident["exits"] / resident["plain"]}


def resident_bytes(folder: Path, arm: str) -> int:
    """Load a saved backbone, answer ten batches of 8, and return the process' resident size."""
    torch.set_num_threads(1)
    backbone = load_backbone(folder)
    if arm == "exits":
        run = exiting_model(backbone, DEFAULT_ENGINE, untrained_heads(backbone)).forward
        del backbone
        return_freed_memory()  # as the handler does once it has loaded
    else:
        run = backbone.graph.forward
    with torch.no_grad():
        for _ in range(10):
            run(torch.randn(8, 3, 224, 224))
    return int(psutil.Process().memory_info().rss)


def summary(cells: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the figures that the project is held to, as far as they were measured."""
    def cell(batch: int, figure: str, engine: str = DEFAULT_ENGINE, exits: str = "10/60/12") -> float | None:
        return next((one[figure] for one in cells if (one["batch"], one["engine"], one["exits"]) == (
            batch, engine, exits)), None)

    def worst(engine: str) -> float | None:
        return max((one["ratio_to_same_engine"] for one in cells if (one["engine"], one["exits"]) == (engine, "none")),
                   default=None)

    return {
        "no_exit_ratio": worst(DEFAULT_ENGINE), "no_exit_ratio_int8": worst(INT8),
        "exits_same_engine_b8": cell(8, "ratio_to_same_engine"),
        "exits_vs_eager_b8": cell(8, "ratio_to_eager"),
        "bf16_vs_eager_b8": cell(8, "ratio_to_eager", "bfloat16"),
        "int8_vs_eager_b8": cell(8, "ratio_to_eager", INT8),
        "share_of_ideal_b8": cell(8, "share_of_ideal"), "share_of_ideal_b32": cell(32, "share_of_ideal"),
        "batch1_mixed_ratio": cell(1, "ratio_to_same_engine"),
    }


if __name__ == "__main__":
    sys.exit(main())
