"""Exits compared with 8-bit weights, and both together, on the paper's ResNet-18 and CIFAR-10.

    python -m tests.benchmarks.int8 --json FILE

Half of the images are recorded. Exits are trained with replays of them and certified, both on the model in full
precision and on the quantized model. The other half is measured. Every figure compares with the original model,
executed as it was exported. Versions with exits run a share of the requests to the end, as they do by default when they
serve.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES, INT8
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import FULL, FULL_NAME
from early_exit.training.costs.profiling import one_thread
from early_exit.training.data.replay import Replay
from early_exit.training.data.shards import find_shards
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.benchmarks.bench import BATCH
from tests.benchmarks.loop import answers_of, flops_fractions
from tests.benchmarks.report import report
from tests.benchmarks.rows import N_TIMED, SIZES
from tests.benchmarks.subjects import Subject, resnet18_full
from tests.support.arms import ORIGINAL, SHADOW_RATE
from tests.support.served import TIMED, as_in_service, served_model
from tests.support.timing import interleaved, ratio_of_sums

_NAME = "model"
_EVALUATED = 250
Arms = Mapping[str, Callable[[Tensor], Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Exits beside 8-bit weights, and both together.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--rounds", type=int, default=4, help="of replays (%(default)s)")
    options = parser.parse_args()
    restart_with_allocator()
    settings = {**vars(options), "sampling_rate": SHADOW_RATE, **TIMED}
    return report(options.json, lambda scratch: measure(resnet18_full(scratch), scratch, options.tolerance,
                                                        options.rounds), settings)


def measure(subject: Subject, folder: Path, tolerance: float, n_rounds: int) -> dict[str, Any]:
    """Return the figures of a subject's original model, of each engine, and of exits on each.

    Args:
        subject: the subject, which was made in the folder.
        folder: the folder for everything that is made.
        tolerance: the tolerance of the certificates.
        n_rounds: the number of rounds of replays that heads are trained with.
    """
    [recorder] = (folder / "store").glob("*.mar")
    arms: dict[str, Callable[[Tensor], Any]] = {ORIGINAL: subject.backbone.graph}
    plans = {}
    for engine in (DEFAULT_ENGINE, INT8):
        if engine == INT8:
            recorder = build_archive(ArchiveRequest(str(recorder), folder / engine, model_name=_NAME, engine=engine,
                                                    calibrate=subject.records))
        layout = ArchiveLayout(folder / f"{engine}-recorder")
        extract(recorder, layout.root)
        run = RunPaths(folder / f"{engine}-run")
        shards = find_shards(subject.records, _NAME, subject.backbone.description)
        made = train(_NAME, layout, shards, TrainingOptions(
            tolerance, batch_size=BATCH, search=None, replay=Replay(rounds=n_rounds),
            engine=ENGINES[engine].identity(layout.folder)), run)
        exiting = served_model(build_archive(ArchiveRequest(str(recorder), folder / f"{engine}-store", plan=run.plan)))
        exiting.shadow.rate = SHADOW_RATE
        arms |= {engine: served_model(recorder), with_exits(engine): exiting}
        plans[with_exits(engine)] = made.plan
    return figures(arms, plans, subject.inputs, subject.truth)


def with_exits(engine: str) -> str:
    return f"{engine} with exits"


def figures(arms: Arms, plans: Mapping[str, ExitPlan], inputs: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return a row for each arm, compared with the original, and where requests left the full-precision model.

    Args:
        arms: the arms by name.
        plans: the plans of the arms with exits. Keys are names of arms.
        inputs: the inputs of the measured requests, (M, ...).
        truth: the true classes of the measured requests, (M,).
    """
    with torch.no_grad():
        classes = {name: torch.cat([arm(batch).argmax(dim=1) for batch in inputs.split(_EVALUATED)])
                   for name, arm in arms.items()}
        work = {name: work_of(arms[name], plan, inputs) for name, plan in plans.items()}
        with one_thread():
            timed = {name: as_in_service(arm) if isinstance(arm, EarlyExitModel) else arm for name, arm in arms.items()}
            seconds = {size: interleaved(timed, inputs[:N_TIMED].split(size)) for size in SIZES}
    accuracy = {name: (found == truth).double().mean().item() for name, found in classes.items()}
    certificates = {name: plan.certificate for name, plan in plans.items()}
    rows = [{"arm": name, "accuracy": accuracy[name], "accuracy_loss": accuracy[ORIGINAL] - accuracy[name],
             "disagreement": (classes[name] != classes[ORIGINAL]).double().mean().item(),
             "flops_ratio": work[name][0] if name in work else 1.0,
             "cpu_time_ratio": {str(size): ratio_of_sums(of[name], of[ORIGINAL]) for size, of in seconds.items()},
             "certificate": certificate.in_words() if (certificate := certificates.get(name)) else None}
            for name in arms]
    flops_ratio, exits = work[with_exits(DEFAULT_ENGINE)]
    return {"rows": rows, "flops_ratio": flops_ratio, "exits": exits}


def work_of(model: EarlyExitModel, plan: ExitPlan, inputs: Tensor) -> tuple[float, list[dict[str, Any]]]:
    """Return the mean FLOPs of a request, as a fraction of the backbone's, and a dict for each exit and one for the
    whole model at the end: the layer, the cost, and the share of the requests that leave there."""
    answers = [answers_of(model, batch) for batch in inputs.split(BATCH)]
    flops = torch.cat([flops_fractions(one, model, plan) for one in answers]).mean().item()
    taken = torch.cat([one.stages for one in answers])
    exits = [(one.layer, one.cost, model.assembly.layers.index(one.layer)) for one in plan.exits]
    return flops, [
        {"layer": layer, "cost": cost, "share": (taken == stage).double().mean().item()}
        for layer, cost, stage in (*exits, (FULL_NAME, 1.0, FULL))]


if __name__ == "__main__":
    sys.exit(main())
