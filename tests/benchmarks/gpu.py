"""Exits on a GPU: ResNets at 224 px against the plain backbone, both in CUDA graphs.

    python -m tests.benchmarks.gpu --json FILE

Wall time from inputs on the GPU to scores there, all arms interleaved, medians of the ratios of the rounds to the plain
backbone on the same engine. Heads are real, untrained, and decide: thresholds are such that 10, 60 and 12 % of the
inputs leave after layers 1 to 3, and batches are made of them in these shares. The arms: `eager` (the plain backbone as
it was exported), `off` (cut in stages, the exits bypassed), `none` (three exits, nobody leaves), `10/60/12`, and
`served` (the same, or off where the model found in 1500 batches that its exits do not pay). At batch 1 a round is ten
requests. `ideal` is what the stages alone take for the rows that reach them, in the sizes that graphs have; `left` is
how many rows came to the end, and left after each layer; `prepare_s` is what capturing the graphs took.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.cuda.stages import GraphedStage, graphed
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import ENGINES
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Answers, Stage, run_with_exits
from early_exit.handler.model.early_exit_model import EarlyExitModel
from tests.benchmarks.engine import exiting_model, untrained_heads
from tests.benchmarks.report import conditions, save
from tests.support.timing import interleaved, median_ratio

LAYERS = {"resnet18": ("layer1.1", "layer2.1", "layer3.1"), "resnet50": ("layer1.2", "layer2.3", "layer3.5")}
LEAVERS = {1: (1, 6, 1, 2), 16: (2, 9, 2, 3), 32: (3, 19, 4, 6), 64: (6, 38, 8, 12), 128: (13, 77, 15, 23)}
"""By batch size: rows that leave after each layer, and those that reach the end; at batch 1 of ten requests."""
ENGINE_NAMES = ("folded", "bfloat16")
ROUNDS = 25
N_INPUTS, N_LEARNED = 256, 1500
"""Inputs that batches are made of, and batches in which the model finds out whether its exits pay."""
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
    run = conditions(vars(options))
    figures: dict[str, Any] = {}
    cells: list[dict[str, Any]] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            Backbone.from_module(getattr(torchvision.models, name)(weights=None).eval(), (3, 224, 224)).save(
                Path(scratch))
            backbone = load_backbone(Path(scratch), DEVICE)
            for engine in ENGINE_NAMES:
                for size in options.batches:
                    for cell in measure(backbone, LAYERS[name], engine, size):
                        cells.append({"model": name, **cell})
                        print(json.dumps(cells[-1]), flush=True)
                    figures = summary(cells)
                    save(options.json, run, figures | {"cells": cells})
    print(json.dumps(figures, indent=1))
    return 0


def measure(backbone: Backbone, layers: Sequence[str], engine: str, size: int) -> list[dict[str, Any]]:
    """Return a row for each arm on one engine and batch size."""
    eager, plain = (graphed([Stage(ENGINES[name].unsplit(backbone).forward)], DEVICE) for name in ("eager", engine))
    pool = torch.randn(N_INPUTS, 3, 224, 224, device=DEVICE)
    heads = untrained_heads(backbone, layers)
    never = exiting_model(backbone, engine, heads)
    asking = torch.ones(N_INPUTS, dtype=torch.bool)
    thresholds, destinies = shares(run_with_exits((pool,), never.assembly.stages, anytime=asking))
    model = exiting_model(backbone, engine, heads, thresholds, control_rate=0.5)
    n_calls = 10 if size == 1 else 1
    rows = torch.cat([(destinies == number).nonzero().flatten()[:n] for number, n in enumerate(LEAVERS[size])])
    batches = pool[rows[torch.randperm(len(rows))]].view(n_calls, size, *pool.shape[1:])
    never.prepare(size)
    started = gpu_clock()
    model.prepare(size)
    prepare_s = gpu_clock() - started
    served = 0 if pays_for(model, batches) else model.assembly.last_level
    arms: dict[str, Callable[[int], object]] = {
        "eager": lambda number: [eager[0].forward(batch) for batch in batches],
        "plain": lambda number: [plain[0].forward(batch) for batch in batches],
        "off": lambda number: every(model, batches, model.assembly.last_level),
        "none": lambda number: every(never, batches),
        "10/60/12": lambda number: every(model, batches),
        "served": lambda number: every(model, batches, served)}
    left = [int(n) for n in torch.cat([answers.stages + 1 for answers in every(model, batches)]).bincount(minlength=4)]
    seconds = interleaved(arms, range(ROUNDS), gpu_clock)
    return [{"engine": engine, "batch": size, "exits": arm, "ms": 1e3 * sorted(taken)[len(taken) // 2] / n_calls,
             "ratio": median_ratio(taken, seconds["plain"]), "ratio_to_eager": median_ratio(taken, seconds["eager"]),
             **({"ideal": ideal(model, size), "left": left, "prepare_s": prepare_s} if arm == "10/60/12" else {})}
            for arm, taken in seconds.items()]


def every(model: EarlyExitModel, batches: Tensor, level: int = 0) -> list[Answers]:
    """Return a model's answers to batches in one of its settings."""
    nobody = torch.zeros(batches.shape[1], dtype=torch.bool)
    return [model.executor.run((batch,), level, nobody).answers for batch in batches]


def pays_for(model: EarlyExitModel, batches: Tensor) -> bool:
    """Tell whether a model finds that its exits pay for batches."""
    for number in range(N_LEARNED):
        model.log.begin()
        model(batches[number % len(batches)])
        if any(model.bypass.bypassed().values()):
            return False
    return True


def shares(answers: Answers) -> tuple[list[float], Tensor]:
    """Return thresholds that let the shares of `LEAVERS` leave, and after which stage each row does.

    Args:
        answers: with every exit's opinion of every row.
    """
    left = torch.full((N_INPUTS,), len(LEAVERS[128]) - 1)
    thresholds = []
    for number, n in enumerate(LEAVERS[128][:-1]):
        confidence = ConfidencePolicy(1.0, 0.0).confidence(answers.exit_scores[number].float()).cpu()
        confidence[left == number] = 0
        waiting = left == len(LEAVERS[128]) - 1
        n_leaving = round(N_INPUTS * n / 128)
        most = confidence.where(waiting, torch.tensor(0.0)).sort(descending=True)
        thresholds.append(float(most.values[n_leaving - 1:n_leaving + 1].mean()))
        left[most.indices[:n_leaving]] = number
    return thresholds, left


def ideal(model: EarlyExitModel, size: int) -> float:
    """Return what the stages alone would take as a share of what they take for all rows."""
    spent, whole = 0.0, 0.0
    staying = sum(LEAVERS[size])
    for stage, leavers in zip(model.assembly.stages, LEAVERS[size]):
        assert isinstance(stage, GraphedStage)
        # At batch 1 these are requests, one after the other.
        spent += seconds_of(stage, 1) * staying if size == 1 else seconds_of(stage, staying)
        whole += seconds_of(stage, size) * (sum(LEAVERS[1]) if size == 1 else 1)
        staying -= leavers
    return spent / whole


def seconds_of(stage: GraphedStage, n_rows: int) -> float:
    """Return what a stage takes for so many rows."""
    captured = stage.graph.captured(n_rows, ())
    assert captured is not None
    taken = []
    for _ in range(10):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        captured.graph.replay()
        ended.record()
        ended.synchronize()
        taken.append(1e-3 * started.elapsed_time(ended))
    return sorted(taken)[len(taken) // 2]


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
            "worst_ratio_served": worst("served"),
            "worst_ratio_with_exits": worst("10/60/12"), "worst_ratio_with_exits_b64_b128": worst("10/60/12", 64, 128)}


if __name__ == "__main__":
    sys.exit(main())
