"""The whole loop on ResNet-18 (width 32) and the CIFAR-10 JPEGs through a real TorchServe.

    python -m tests.benchmarks.loop --json FILE

The first half of the images is recorded and trained on, without labels and with the default search, so `told` is what
`ee-train` prints there. A version with exits is rolled in under load.
The other half measures three arms, which take turns: the user's original, in which nothing is folded or fused, ours
without exits, and ours with exits. `vs_original` and `vs_without_exits` compare every figure of ours with exits with
that arm. Ratios at the top level compare with ours without exits, so they show the effect of the exits alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.inference.forward import Answers
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import FULL
from early_exit.training.costs.profiling import one_thread
from early_exit.training.options import TrainingOptions
from tests.benchmarks.report import report
from tests.support.arms import ARMS, ORIGINAL, SHADOW_RATE, WITH_EXITS, WITHOUT_EXITS
from tests.support.cifar import as_batch, load_requests, load_weights
from tests.support.client import failed, latency_ms
from tests.support.loop import LoopResult, run_loop
from tests.support.models.cifar_resnet18w32 import ResNet18W32
from tests.support.original import original_mar
from tests.support.served import TIMED, as_in_service, served_model
from tests.support.timing import interleaved, ratio_of_sums

CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\nearly_exit:\n  seal_after_s: 5\n"
BATCHES, N_TIMED = (1, 8, 32), 3200
"""The sizes of batches for which the model is timed, and the number of requests, the first ones."""


def main() -> int:
    parser = argparse.ArgumentParser(description="The whole loop on CIFAR-10 through a real TorchServe.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--images", type=int, default=10_000, help="half of them are recorded (%(default)s)")
    options = parser.parse_args()
    restart_with_allocator()
    training = TrainingOptions(options.tolerance, options.confidence)
    settings = {**settings_of(training, CONFIG), "images": options.images}
    return report(options.json, lambda scratch: measure(scratch, training, options.images), settings)


def settings_of(options: TrainingOptions, config: str) -> dict[str, Any]:
    """Return what the figures of a loop depend on, whatever the model and the requests are."""
    return {"tolerance": options.tolerance, "confidence": options.confidence,
            "search": asdict(options.search) if options.search else None,
            "server": config, "clients": 8, "sampling_rate": SHADOW_RATE, **TIMED}


def measure(folder: Path, options: TrainingOptions, n_images: int) -> dict[str, Any]:
    """Run the loop in a folder and return its figures."""
    bodies, labels = (found[:n_images] for found in load_requests())
    weights = load_weights("resnet18w32-cifar10-jpeg")
    half = len(bodies) // 2
    original = original_mar(folder / "original", "cifar", "cifar_resnet18w32.py", "cifar_handler.py", weights, CONFIG)
    result = run_loop(original, folder, bodies[:half], bodies[half:], input_shape=(3, 32, 32), config=CONFIG,
                      options=options)
    model = ResNet18W32()
    model.load_state_dict(weights)
    return summarise(result, [str(label) for label in labels[half:]], as_batch(bodies[half:]), model.eval())


def summarise(result: LoopResult, labels: list[str], inputs: Tensor, original: nn.Module) -> dict[str, Any]:
    """Return the figures of a loop.

    Args:
        result: the result of the loop.
        labels: the labels of the measured requests.
        inputs: the same requests as the handler gives them to the model, (M, ...).
        original: the user's model, in eval mode.
    """
    times = {size: model_seconds(result, inputs[:N_TIMED].split(size), original) for size in BATCHES}
    worker = {arm: {"worker_cpu_ms_per_request": 1000 * one.cpu_s, "worker_mb": one.mb,
                    "p50_ms": latency_ms(one.replies, 0.5), "p95_ms": latency_ms(one.replies, 0.95)}
              for arm, one in result.arms.items()}
    flops = flops_of(result, inputs, original)
    compared = {f"vs_{arm}": compared_with(arm, result, labels, times, worker, flops)
                for arm in (ORIGINAL, WITHOUT_EXITS)}
    certificate = result.report.plan.certificate
    of_exits = compared["vs_without_exits"]
    return {
        "accuracy_before": result.accuracy(ORIGINAL, labels),
        "accuracy_after": result.accuracy(WITH_EXITS, labels),
        "disagreement": result.disagreement(ORIGINAL, WITH_EXITS),
        "disagreement_without_exits": result.disagreement(ORIGINAL, WITHOUT_EXITS),
        "certified_bound": certificate.tolerance if certificate else None,
        "certificate": {"n": certificate.n, "k": certificate.k, "confidence": certificate.confidence}
        if certificate else None,
        "told": result.report.to_text().splitlines(),
        "hits": result.hits(),
        "exits": result.exits(),
        **{name: of_exits[name] for name in ("flops_ratio", "cpu_time_ratio", "cpu_time_ratio_by_batch")},
        "flops_ratio_on_certify_part": result.report.deployed.flops,
        **{name: {"before": worker[ORIGINAL][name], "after": worker[WITH_EXITS][name],
                  **{arm: worker[arm][name] for arm in ARMS}} for name in worker[ORIGINAL]},
        **compared,
        "requests": len(result.replies),
        "failed": failed(result.replies),
        "records": result.n_records,
        "records_bytes_per_request": result.record_bytes / result.n_records,
    }


def compared_with(arm: str, result: LoopResult, labels: list[str], times: Mapping[int, Mapping[str, list[float]]],
                  worker: Mapping[str, Mapping[str, float]], flops: Mapping[str, float]) -> dict[str, Any]:
    """Compare ours with exits with another arm. Return ratios, except for the accuracy loss and the disagreement."""
    by_batch = {size: ratio_of_sums(seconds[WITH_EXITS], seconds[arm]) for size, seconds in times.items()}
    return {
        "accuracy_loss": result.accuracy(arm, labels) - result.accuracy(WITH_EXITS, labels),
        "disagreement": result.disagreement(arm, WITH_EXITS),
        "flops_ratio": flops[WITH_EXITS] / flops[arm],
        "cpu_time_ratio": by_batch[8], "cpu_time_ratio_by_batch": by_batch,
        **{name: worker[WITH_EXITS][name] / worker[arm][name] for name in worker[arm]},
    }


def model_seconds(result: LoopResult, batches: Sequence[Tensor], original: nn.Module) -> dict[str, list[float]]:
    """Return the CPU seconds that each arm's model takes for some rounds. The arms take turns."""
    with one_thread(), torch.no_grad():
        return interleaved({ORIGINAL: original, WITHOUT_EXITS: as_in_service(served_model(result.recorder)),
                            WITH_EXITS: as_in_service(exiting_model(result))}, batches)


def exiting_model(result: LoopResult) -> EarlyExitModel:
    """Return the model with exits as it is deployed: shadow samples run to the end although they are answered early."""
    model = served_model(result.exiting)
    model.shadow.rate = SHADOW_RATE
    return model


def flops_of(result: LoopResult, inputs: Tensor, original: nn.Module) -> dict[str, float]:
    """Return the FLOPs of each arm per request."""
    model = exiting_model(result)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            original(inputs[:1])
        served = torch.cat([flops_fractions(answers_of(model, batch), model, result.report.plan)
                            for batch in inputs.split(8)])
    backbone = model.assembly.description.flops
    return {ORIGINAL: counter.get_total_flops(), WITHOUT_EXITS: backbone, WITH_EXITS: served.mean().item() * backbone}


def answers_of(model: EarlyExitModel, batch: Tensor) -> Answers:
    """Return what a model logs about its answers to a batch."""
    model.log.take()
    model(batch)
    return model.log.take()[0].answers


def flops_fractions(answers: Answers, model: EarlyExitModel, plan: ExitPlan) -> Tensor:
    """Return the FLOPs of each row as a fraction of the backbone's.

    Every head counts. A shadow sample costs all, and on an engine that is not exact the original model, too.
    """
    runs_to_end = answers.stages == FULL
    runs_to_end[answers.shadow] = True
    spent, on_heads = torch.ones(len(answers.stages)), torch.zeros(len(answers.stages))
    for planned in plan.exits:
        stage = model.assembly.layers.index(planned.layer)
        on_heads[runs_to_end | (answers.stages >= stage)] += planned.head_cost
        spent[(answers.stages == stage) & ~runs_to_end] = planned.cost
    if not model.assembly.engine.is_exact:
        spent[answers.shadow] += 1
    return spent + on_heads


if __name__ == "__main__":
    sys.exit(main())
