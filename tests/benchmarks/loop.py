"""The whole loop on ResNet-18 (width 32) and the CIFAR-10 JPEGs through a real TorchServe.

    python -m tests.benchmarks.loop --json FILE

The first 5,000 images are recorded and trained on, without labels; a version with exits is rolled in under
load; the last 5,000 are measured before and after.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import FULL
from early_exit.training.costs.profiling import one_thread
from early_exit.training.options import TrainingOptions
from tests.benchmarks.report import report
from tests.support.cifar import as_batch, load_requests, load_weights
from tests.support.client import failed, latency_ms
from tests.support.loop import LoopResult, run_loop
from tests.support.original import original_mar
from tests.support.served import served_model
from tests.support.timing import cpu_ratio

CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\nearly_exit:\n  seal_after_s: 5\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="The whole loop on CIFAR-10 through a real TorchServe.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=0.95)
    options = parser.parse_args()
    restart_with_allocator()
    training = TrainingOptions(options.tolerance, options.confidence, search=None)
    return report(options.json, lambda scratch: measure(scratch, training))


def measure(folder: Path, options: TrainingOptions) -> dict[str, Any]:
    """Run the loop in a folder and return its figures."""
    bodies, labels = load_requests()
    weights = load_weights("resnet18w32-cifar10-jpeg")
    half = len(bodies) // 2
    original = original_mar(folder / "original", "cifar", "cifar_resnet18w32.py", "cifar_handler.py", weights, CONFIG)
    result = run_loop(original, folder, bodies[:half], bodies[half:], input_shape=(3, 32, 32), options=options)
    return summarise(result, labels[half:], bodies[half:])


def summarise(result: LoopResult, labels: list[int], measured: list[bytes]) -> dict[str, Any]:
    """Return the figures of a loop."""
    names = [str(label) for label in labels]
    full, exiting = served_model(result.recorder), served_model(result.exiting)
    exiting.shadow.rate = 0.05  # as deployed: these run to the end though they are answered early
    batches = {size: as_batch(measured).split(size) for size in (1, 8, 32)}
    with one_thread(), torch.no_grad():
        ratios = {size: cpu_ratio(full, exiting, batches[size][:400]) for size in batches}
        served = torch.cat([flops_fractions(exiting, result.report.plan, batch) for batch in batches[8]])
    certificate = result.report.plan.certificate
    return {
        "accuracy_before": result.accuracy(result.before, names),
        "accuracy_after": result.accuracy(result.after, names),
        "disagreement": result.disagreement,
        "certified_bound": certificate.tolerance if certificate else None,
        "certificate": {"n": certificate.n, "k": certificate.k, "confidence": certificate.confidence}
        if certificate else None,
        "hits": result.hits(),
        "flops_ratio": served.mean().item(),
        "flops_ratio_on_certify_part": result.report.deployed.flops,
        "cpu_time_ratio": ratios[8],
        "cpu_time_ratio_by_batch": ratios,
        "worker_cpu_ms_per_request": {"before": 1000 * result.worker_cpu_s_before,
                                      "after": 1000 * result.worker_cpu_s_after},
        "worker_mb": {"before": result.worker_mb_before, "after": result.worker_mb_after},
        "p50_ms": {"before": latency_ms(result.before, 0.5), "after": latency_ms(result.after, 0.5)},
        "p95_ms": {"before": latency_ms(result.before, 0.95), "after": latency_ms(result.after, 0.95)},
        "requests": len(result.replies),
        "failed": failed(result.replies),
        "records": result.n_records,
        "records_bytes_per_request": result.record_bytes / result.n_records,
    }


def flops_fractions(model: EarlyExitModel, plan: ExitPlan, batch: Tensor) -> Tensor:
    """Return the FLOPs of each row as a fraction of the backbone's; shadow rows cost all, and every head counts."""
    model.log.take()
    model(batch)
    answers = model.log.take()[0].answers
    runs_to_end = answers.stages == FULL
    runs_to_end[answers.shadow] = True
    spent, on_heads = torch.ones(len(batch)), torch.zeros(len(batch))
    for planned in plan.exits:
        stage = model.assembly.layers.index(planned.layer)
        on_heads[runs_to_end | (answers.stages >= stage)] += planned.head_cost
        spent[(answers.stages == stage) & ~runs_to_end] = planned.cost
    return spent + on_heads


if __name__ == "__main__":
    sys.exit(main())
