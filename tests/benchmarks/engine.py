"""Exits on top of every engine: ResNet-50 at 224 px with scripted exits, 10/60/12 % after layers 1 to 3.

    python -m tests.benchmarks.engine --json FILE

Times are CPU times of the process with one thread. All arms are interleaved and use the same allocator. The exit heads
are real but untrained; they run, but a script decides which rows leave. The shares hold for all rounds together: rows
are dealt to batches at random, so the counts vary from batch to batch, and `counts` has those that were used. Without
exits, the ratio is the median over rounds. With exits, it is the ratio of sums, because rounds differ. For each row
that leaves, the ideal saves the time of the stages after its exit, as measured for full batches. `ideal_ratio` is what
the used counts would cost in the ideal, and `share_of_ideal` is the share of this saving that was reached, the figure
to judge by. At batch size 1, a round is ten requests.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
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
from early_exit.handler.protocol import FULL
from early_exit.training.costs.profiling import one_thread, profile_backbone
from tests.benchmarks.report import conditions, legible, save
from tests.support.timing import interleaved, median_ratio, ratio_of_sums

LAYERS = ("layer1.2", "layer2.3", "layer3.5")
SHARES = (0.10, 0.60, 0.12)
"""The shares of the rows that leave after each layer."""
BATCHES = (1, 8, 32)
ROUNDS = 24
EXITS = "10/60/12"
"""The name of the arm with exits."""
SPEC = HeadSpec(pool=4, widths=(64,))


def main() -> int:
    parser = argparse.ArgumentParser(description="Exits on top of every engine.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES), metavar="ENGINE",
                        help="to measure, besides eager (all of %(choices)s)")
    parser.add_argument("--batches", nargs="*", type=int, choices=BATCHES, default=list(BATCHES), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(%(default)s)")
    parser.add_argument("--resident", nargs=2, metavar=("FOLDER", "ARM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident:
        print(resident_bytes(Path(options.resident[0]), options.resident[1]))
        return 0
    if options.json is None:
        parser.error("--json FILE is needed")
    restart_with_allocator()
    torch.manual_seed(0)
    run = conditions({**vars(options), "shares": SHARES, "threads_of_model_times": 1})
    engines = ["eager", *(name for name in options.engines if name != "eager")]
    with tempfile.TemporaryDirectory() as scratch, one_thread(), torch.no_grad():
        folder = Path(scratch)
        Backbone.from_module(torchvision.models.resnet50(weights=None).eval(), (3, 224, 224)).save(folder)
        resident = memory(folder)
        backbone = load_backbone(folder)
        if INT8 in engines:  # random inputs will do for calibration, as the speed does not depend on values
            quantize(backbone, (torch.randn(8, 3, 224, 224),), folder)
        cells: list[dict[str, Any]] = []
        counts: dict[int, list[list[int]]] = {}
        for size in options.batches:
            destinies = dealt(size, options.rounds)
            counts[size] = counts_of(destinies)
            cells += measure(backbone, engines, destinies)
            figures = summary(cells) | {"memory": resident, "counts": counts, "cells": cells}
            save(options.json, run, figures)
    print(legible(figures))
    return 0


@dataclass
class Script:
    """Where each row that is still in the model leaves: the number of its exit, or of the last stage."""

    remaining: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def leaves(self, number: int) -> Tensor:
        hits = self.remaining == number
        self.remaining = self.remaining[~hits]
        return hits


def with_exits(model: EarlyExitModel, script: Script) -> list[Stage]:
    """Return the model's stages with scripted decisions. The exits' own decisions are still made, so they take time."""
    def scripted(number: int, stage: Stage) -> Stage:
        if stage.exit is None:
            return stage
        decide = stage.exit.policy
        return replace(stage, exit=replace(stage.exit,
                                           policy=lambda logits: decide(logits) | script.leaves(number)))
    return [scripted(number, stage) for number, stage in enumerate(model.assembly.stages)]


def untrained_heads(backbone: Backbone, paths: Sequence[str] = LAYERS) -> dict[str, Head]:
    """Return an untrained head for each of these layers. Keys are layer paths."""
    layers = [backbone.description.layer(path) for path in paths]
    return {layer.path: Head(SPEC, layer.shape, backbone.description.n_classes).eval() for layer in layers}


def exiting_model(backbone: Backbone, engine: str, heads: Mapping[str, Head], thresholds: Sequence[float] = (),
                  control_rate: float = 0.0) -> EarlyExitModel:
    """Return a model with exits. With the default thresholds, no request leaves early."""
    layers = [backbone.description.layer(path) for path in heads]
    exits = tuple(PlannedExit(layer.path, SPEC, ConfidencePolicy(1.0, threshold), layer.cost, 0.001)
                  for layer, threshold in zip(layers, thresholds or [2.0] * len(layers)))
    plan = ExitPlan(backbone.description.sha256, "paper", exits, None, ENGINES[engine].identity(backbone.folder))
    return build_model(backbone, plan, heads, engine=engine, control_rate=control_rate).to(backbone.device)


def dealt(size: int, n_rounds: int) -> Tensor:
    """Deal the shares of all rows out at random. Return the stage after which each row leaves, (R, calls, size) int64.

    Rows that run to the end have the number of the last stage. At size 1, a round has ten calls.
    """
    n_calls = 10 if size == 1 else 1
    n_rows = n_rounds * n_calls * size
    ends = [round(n_rows * sum(SHARES[:number])) for number in range(len(SHARES) + 1)]
    counts = torch.tensor([*(end - start for start, end in pairwise(ends)), n_rows - ends[-1]])
    destinies = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return destinies[torch.randperm(n_rows)].view(n_rounds, n_calls, size)


def counts_of(destinies: Tensor) -> list[list[int]]:
    """Return for each round how many rows leave after each stage, including the last one."""
    return [torch.bincount(one.flatten(), minlength=len(SHARES) + 1).tolist() for one in destinies]


def measure(backbone: Backbone, engines: list[str], destinies: Tensor) -> list[dict[str, Any]]:
    """Return a row for each engine, with and without exits.

    Args:
        backbone: the backbone of all engines.
        engines: the names of the engines.
        destinies: what `dealt` returned.
    """
    _, n_calls, size = destinies.shape
    inputs = [torch.randn(n_calls, size, 3, 224, 224) for _ in range(3)]
    rounds = [(inputs[number % 3], one) for number, one in enumerate(destinies)]
    arms: dict[str, Any] = {}

    def unsplit(engine: str) -> Any:
        whole = ENGINES[engine].unsplit(backbone)
        return lambda item: [whole.forward(batch) for batch in item[0]]

    def exits(model: EarlyExitModel) -> Any:
        script = Script()
        stages = with_exits(model, script)

        def run(item: tuple[Tensor, Tensor]) -> list[Tensor]:
            left = []
            for batch, script.remaining in zip(*item):
                left.append(run_with_exits((batch,), stages).stages)
            return left

        require_as_dealt(run(rounds[0]), rounds[0][1])
        return run

    for engine in engines:
        model = exiting_model(backbone, engine, untrained_heads(backbone))
        arms[f"{engine} unsplit"] = unsplit(engine)
        arms[f"{engine} none"] = lambda item, stages=model.assembly.stages: [
            run_with_exits((batch,), stages) for batch in item[0]]
        arms[f"{engine} {EXITS}"] = exits(model)
    seconds = interleaved(arms, rounds)
    counts = counts_of(destinies)
    rows: list[dict[str, Any]] = []
    for engine in engines:
        plain, eager = seconds[f"{engine} unsplit"], seconds["eager unsplit"]
        without, exiting = seconds[f"{engine} none"], seconds[f"{engine} {EXITS}"]
        ratio, ideal = ratio_of_sums(exiting, plain), ideal_ratio(stage_shares(backbone, engine, size), counts)
        rows.append({"batch": size, "engine": engine, "exits": "none", "ratio_to_same_engine": median_ratio(
            without, plain), "ratio_to_eager": median_ratio(without, eager)})
        rows.append({"batch": size, "engine": engine, "exits": EXITS, "ratio_to_same_engine": ratio,
                     "ratio_to_eager": ratio_of_sums(exiting, eager), "ideal_ratio": ideal,
                     "share_of_ideal": (1 - ratio) / (1 - ideal)})
    return rows


def require_as_dealt(left: Sequence[Tensor], destinies: Tensor) -> None:
    """Check that rows left where the script says.

    Args:
        left: for each call of a round, the exit at which each row left, or `FULL`, (B,) int64.
        destinies: the stage after which each row is to leave, (calls, B) int64.
    """
    found = torch.stack(list(left))
    expected = destinies.masked_fill(destinies == len(SHARES), FULL)
    if not torch.equal(found, expected):
        raise AssertionError(f"expected rows to leave after the stages {expected.tolist()}, found {found.tolist()}")


def stage_shares(backbone: Backbone, engine: str, size: int) -> list[float]:
    """Return the share of a full batch's time that each stage takes, without the heads."""
    layers = [backbone.description.layer(path) for path in LAYERS]
    stages = torch.tensor(profile_backbone(backbone, layers, engine=engine, sizes=(size,)).stages).flatten()
    shares: list[float] = (stages / stages.sum()).tolist()
    return shares


def ideal_ratio(stages: Sequence[float], counts: Sequence[Sequence[int]]) -> float:
    """Return what rows would cost if each cost only the stages up to its exit, as a share of the cost of full passes.

    Args:
        stages: the share of the time that each stage takes.
        counts: for each round, how many rows leave after each stage, including the last one.
    """
    spent = list(accumulate(stages))
    return sum(n * cost for one in counts for n, cost in zip(one, spent)) / sum(map(sum, counts))


def memory(folder: Path) -> dict[str, float]:
    """Return the resident MB of a process with the plain exported backbone of a folder, that of a process with exits,
    and their ratio."""
    resident = {arm: int(subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.engine", "--resident", str(folder), arm], check=True,
        capture_output=True, text=True).stdout) for arm in ("plain", "exits")}
    return {"plain_mb": resident["plain"] / 1e6, "exits_mb": resident["exits"] / 1e6,
            "ratio": resident["exits"] / resident["plain"]}


def resident_bytes(folder: Path, arm: str) -> int:
    """Load a saved backbone, answer ten batches of 8, and return the resident size of the process."""
    torch.set_num_threads(1)
    backbone = load_backbone(folder)
    if arm == "exits":
        run = exiting_model(backbone, DEFAULT_ENGINE, untrained_heads(backbone)).forward
        del backbone
    else:
        run = backbone.graph.forward
    return_freed_memory()  # as the handler does after loading
    with torch.no_grad():
        for _ in range(10):
            run(torch.randn(8, 3, 224, 224))
    return int(psutil.Process().memory_info().rss)


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the project is held to, as far as they were measured."""
    by_place = {(one["batch"], one["engine"], one["exits"]): one for one in cells}

    def cell(batch: int, figure: str, engine: str = DEFAULT_ENGINE) -> float | None:
        return by_place.get((batch, engine, EXITS), {}).get(figure)

    def worst(engine: str) -> float | None:
        return max((one["ratio_to_same_engine"] for one in cells if (one["engine"], one["exits"]) == (engine, "none")),
                   default=None)

    def by_engine(figure: str) -> dict[str, dict[str, float]]:
        engines = dict.fromkeys(engine for _, engine, exits in by_place if exits == EXITS)
        return {engine: {str(batch): one[figure] for (batch, name, exits), one in by_place.items()
                         if (name, exits) == (engine, EXITS)} for engine in engines}

    return {
        "share_of_ideal": by_engine("share_of_ideal"), "ideal_ratio": by_engine("ideal_ratio"),
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
