"""Exits on a GPU: ResNets at 224 px against the plain backbone, both in CUDA graphs.

    python -m tests.benchmarks.gpu --json FILE

Times are wall times from inputs on the GPU to scores on the GPU. All arms are interleaved, and figures are medians over
rounds of the ratio to the plain backbone on the same engine. The exit heads are real but untrained, and they decide:
thresholds let 10, 60 and 12 % of the inputs leave after layers 1 to 3, and batches have inputs in these shares. The
arms are `eager` (the plain backbone as it was exported), `off` (stages with bypassed exits), `none` (three exits at
which nothing leaves), `10/60/12`, and `served` (the same, or `off` if the model found in 1500 batches that its exits do
not pay). A round is eight batches, or ten requests at batch size 1. `ideal` is the time of the stages alone for the
rows that reach them, in the batch sizes that the graphs have, as a share of their time for all rows; `share_of_ideal`
is the share of this saving that was reached; `left` is how many rows of a round ran to the end, and how many left after
each layer; `prepare_s` is the time for capturing the graphs.
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
from tests.benchmarks.engine import SHARES, dealt, exiting_model, untrained_heads
from tests.benchmarks.report import conditions, save
from tests.support.timing import interleaved, median_ratio

LAYERS = {"resnet18": ("layer1.1", "layer2.1", "layer3.1"), "resnet50": ("layer1.2", "layer2.3", "layer3.5")}
BATCHES, CALLS = (1, 16, 32, 64, 128), 8
"""The batch sizes, and the number of batches in a round; at size 1, a round has ten batches."""
ENGINE_NAMES = ("folded", "bfloat16")
ROUNDS = 25
N_INPUTS, N_LEARNED = 256, 1500
"""The number of inputs that batches are made of, and of batches in which the model finds out if its exits pay."""
DEVICE = torch.device("cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description="Exits on a GPU.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--models", nargs="*", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--batches", nargs="*", type=int, choices=BATCHES, default=list(BATCHES), metavar="SIZE")
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
    thresholds, leaves_after = shares(run_with_exits((pool,), never.assembly.stages, anytime=asking))
    model = exiting_model(backbone, engine, heads, thresholds, control_rate=0.5)
    destinies = dealt(size, 1 if size == 1 else CALLS).flatten(0, 1)
    n_calls = len(destinies)
    batches = pool[rows_of(destinies, leaves_after)]
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
    best = ideal(model, destinies)
    saved = 1 - median_ratio(seconds["10/60/12"], seconds["plain"])
    of_exits = {"ideal": best, "share_of_ideal": saved / (1 - best), "left": left, "prepare_s": prepare_s}
    return [{"engine": engine, "batch": size, "exits": arm, "ms": 1e3 * sorted(taken)[len(taken) // 2] / n_calls,
             "ratio": median_ratio(taken, seconds["plain"]), "ratio_to_eager": median_ratio(taken, seconds["eager"]),
             **(of_exits if arm == "10/60/12" else {})}
            for arm, taken in seconds.items()]


def every(model: EarlyExitModel, batches: Tensor, level: int = 0) -> list[Answers]:
    """Return a model's answers to batches at one of its fallback levels."""
    nobody = torch.zeros(batches.shape[1], dtype=torch.bool)
    return [model.executor.run((batch,), level, nobody).answers for batch in batches]


def pays_for(model: EarlyExitModel, batches: Tensor) -> bool:
    """Tell whether a model finds that its exits pay for these batches."""
    for number in range(N_LEARNED):
        model.log.begin()
        model(batches[number % len(batches)])
        if any(model.bypass.bypassed().values()):
            return False
    return True


def rows_of(destinies: Tensor, leaves_after: Tensor) -> Tensor:
    """Return for each place in the batches the row of an input that leaves after the stage chosen for that place.

    Args:
        destinies: the number of the stage that is chosen for each place, (calls, size).
        leaves_after: the number of the stage after which each input leaves, (N,).
    """
    rows = torch.empty_like(destinies)
    for number in destinies.unique().tolist():
        such, wanted = (leaves_after == number).nonzero().flatten(), destinies == number
        rows[wanted] = such[torch.randint(len(such), (int(wanted.sum()),))]
    return rows


def shares(answers: Answers) -> tuple[list[float], Tensor]:
    """Return thresholds that let the shares of `SHARES` leave, and the stage after which each row leaves.

    Args:
        answers: answers with every exit's prediction for every row.
    """
    left = torch.full((N_INPUTS,), len(SHARES))
    thresholds = []
    for number, share in enumerate(SHARES):
        confidence = ConfidencePolicy(1.0, 0.0).confidence(answers.exit_scores[number].float()).cpu()
        waiting = left == len(SHARES)
        n_leaving = round(N_INPUTS * share)
        most = confidence.where(waiting, torch.tensor(0.0)).sort(descending=True)
        thresholds.append(float(most.values[n_leaving - 1:n_leaving + 1].mean()))
        left[most.indices[:n_leaving]] = number
    return thresholds, left


def ideal(model: EarlyExitModel, destinies: Tensor) -> float:
    """Return the time of the stages alone for the rows that reach them, as a share of their time for all rows.

    Args:
        model: the model, with exits.
        destinies: the stage after which each row leaves, (calls, size).
    """
    spent, whole = 0.0, 0.0
    for number, stage in enumerate(model.assembly.stages):
        assert isinstance(stage, GraphedStage)
        staying = (destinies >= number).sum(dim=1).tolist()
        taken = {n: seconds_of(stage, n) for n in {destinies.shape[1], *staying} if n}
        spent += sum(taken[n] for n in staying if n)
        whole += taken[destinies.shape[1]] * len(destinies)
    return spent / whole


def seconds_of(stage: GraphedStage, n_rows: int) -> float:
    """Return the seconds that a stage takes for so many rows."""
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
    """Wait until the GPU has finished its work; return the seconds of the wall clock."""
    torch.cuda.synchronize()
    return time.perf_counter()


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the project is held to: the worst of each kind that was measured."""
    def worst(exits: str, *sizes: int) -> float:
        return max((one["ratio"] for one in cells if one["exits"] == exits and one["batch"] in (sizes or BATCHES)),
                   default=float("nan"))

    return {"device": torch.cuda.get_device_name(), "worst_ratio_off": worst("off"), "worst_ratio_none": worst("none"),
            "worst_ratio_served": worst("served"),
            "worst_ratio_with_exits": worst("10/60/12"), "worst_ratio_with_exits_b64_b128": worst("10/60/12", 64, 128)}


if __name__ == "__main__":
    sys.exit(main())
