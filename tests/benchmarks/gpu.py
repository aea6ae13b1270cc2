"""Exits on a GPU: ResNets at 224 px against the plain backbone, both in CUDA graphs.

    python -m tests.benchmarks.gpu --json FILE

Wall time from inputs on the GPU to scores there, all arms interleaved, medians of the ratios of the rounds to the plain
backbone on the same engine. Heads are real, untrained, and run; which rows leave after layers 1 to 3 is scripted. The
arms: `eager` (the plain backbone as it was exported), `off` (cut in stages, no exit), `none` (three exits, nobody
leaves), `10/60/12` (that many percent leave at them). At batch 1 a round is ten requests. `ideal` is what the stages
alone take for the rows that reach them, in the sizes that graphs have.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from early_exit.handler.backbone import Backbone
from early_exit.handler.cuda_graphs import padded
from early_exit.handler.cuda_stages import GraphedStage, graphed
from early_exit.handler.engine import ENGINES
from early_exit.handler.policy import ConfidencePolicy
from early_exit.handler.served import ServedModel
from early_exit.handler.stages import Stage, run_with_exits
from tests.benchmarks.engine import exiting_model
from tests.support.timing import interleaved, median_ratio

LAYERS = {"resnet18": ("layer1.1", "layer2.1", "layer3.1"), "resnet50": ("layer1.2", "layer2.3", "layer3.5")}
LEAVERS = {1: (1, 6, 1, 2), 16: (2, 9, 2, 3), 32: (3, 19, 4, 6), 64: (6, 38, 8, 12), 128: (13, 77, 15, 23)}
"""By batch size: rows that leave after each layer, and those that reach the end; at batch 1 of ten requests."""
ENGINE_NAMES = ("folded", "bfloat16")
ROUNDS = 25
DEVICE = torch.device("cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description="Exits on a GPU.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--models", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batches", nargs="*", type=int, choices=LEAVERS, default=list(LEAVERS), metavar="SIZE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("left out: this machine has no GPU that torch can use")
        return 0
    torch.manual_seed(0)
    figures: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            Backbone.from_module(getattr(torchvision.models, name)(weights=None).eval(), (3, 224, 224)).save(
                Path(scratch))
            backbone = Backbone.load(Path(scratch), DEVICE)
            for engine in ENGINE_NAMES:
                for size in options.batches:
                    for cell in measure(backbone, LAYERS[name], engine, size):
                        cells.append({"model": name, **cell})
                        print(json.dumps(cells[-1]), flush=True)
                    figures = summary(cells)
                    options.json.write_text(json.dumps(figures | {"cells": cells}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


def measure(backbone: Backbone, layers: Sequence[str], engine: str, size: int) -> list[dict[str, Any]]:
    """Return a row for each arm on one engine and batch size."""
    model = exiting_model(backbone, engine, layers)
    eager, plain = (graphed([Stage(ENGINES[name].unsplit(backbone).forward)], DEVICE) for name in ("eager", engine))
    n_calls = 10 if size == 1 else 1
    destinies = torch.repeat_interleave(torch.arange(4), torch.tensor(LEAVERS[size]))
    batches = torch.randn(n_calls, size, 3, 224, 224, device=DEVICE)
    arms: dict[str, Callable[[int], object]] = {
        "eager": lambda number: [eager[0].forward(batch) for batch in batches],
        "plain": lambda number: [plain[0].forward(batch) for batch in batches],
        "off": lambda number: [run_with_exits((batch,), model.steps[-1]) for batch in batches],
        "none": lambda number: [run_with_exits((batch,), model.stages) for batch in batches]}
    scripts = [scripted(model, one) for one in destinies[torch.randperm(len(destinies))].view(n_calls, size)]
    arms["10/60/12"] = lambda number: [run_with_exits((batch,), one) for batch, one in zip(batches, scripts)]
    model.prepare(size)
    seconds = interleaved(arms, range(ROUNDS), gpu_clock)
    return [{"engine": engine, "batch": size, "exits": arm, "ms": 1e3 * sorted(taken)[len(taken) // 2] / n_calls,
             "ratio": median_ratio(taken, seconds["plain"]), "ratio_to_eager": median_ratio(taken, seconds["eager"]),
             "ideal": ideal(model, size) if arm == "10/60/12" else None} for arm, taken in seconds.items()]


def ideal(model: ServedModel, size: int) -> float:
    """Return what the stages alone would take as a share of what they take for all rows."""
    spent, whole = 0.0, 0.0
    staying = sum(LEAVERS[size])
    for stage, leavers in zip(model.stages, LEAVERS[size]):
        assert isinstance(stage, GraphedStage)
        # At batch 1 these are requests, one after the other.
        spent += stage.graph.seconds(1) * staying if size == 1 else stage.graph.seconds(staying)
        whole += stage.graph.seconds(size) * (sum(LEAVERS[1]) if size == 1 else 1)
        staying -= leavers
    return spent / whole


def scripted(model: ServedModel, destinies: Tensor) -> list[Stage]:
    """Return the model's stages with heads that are made sure of the rows that are to leave.

    Args:
        model: with an exit after each stage but the last.
        destinies: (B,) for each row the number of the exit where it leaves, or that of the last stage.
    """
    stages: list[Stage] = []
    for number, stage in enumerate(model.stages[:-1]):
        assert stage.exit is not None
        leaves = torch.zeros(padded(len(destinies)), 1, device=DEVICE)  # a graph has more rows than a batch
        leaves[:len(destinies), 0] = 1e4 * (destinies == number)
        sure = torch.cat([leaves, torch.zeros(len(leaves), model.description.n_classes - 1, device=DEVICE)], dim=1)
        stages.append(replace(stage, exit=replace(
            stage.exit, head=lambda x, head=stage.exit.head, sure=sure: head(x) + sure,
            policy=ConfidencePolicy(1.0, 0.999))))
        stay = destinies[destinies > number]
        if stage.exit.shrinks(len(destinies), len(stay)):
            destinies = stay
        if not len(stay):
            break
    return [*stages, *model.stages[len(stages):]]


def gpu_clock() -> float:
    """Return the seconds of the wall clock once the GPU has done what was asked of it."""
    torch.cuda.synchronize()
    return time.perf_counter()


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the project is held to: the worst of each kind that was measured."""
    def worst(exits: str, *sizes: int) -> float:
        return max((one["ratio"] for one in cells if one["exits"] == exits and one["batch"] in (sizes or LEAVERS)),
                   default=float("nan"))

    return {"device": torch.cuda.get_device_name(), "worst_ratio_off": worst("off"), "worst_ratio_none": worst("none"),
            "worst_ratio_with_exits": worst("10/60/12"), "worst_ratio_with_exits_b64_b128": worst("10/60/12", 64, 128)}


if __name__ == "__main__":
    sys.exit(main())
