"""`make demo`: the whole loop on scikit-learn's digits, with a table of what was gained at the end."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from early_exit.handler.allocator import restart_with_allocator
from early_exit.training.command import raise_on_terminate
from early_exit.training.costs.profiling import one_thread
from early_exit.training.options import TrainingOptions
from tests.support.client import failed, latency_ms
from tests.support.digits import batches, measured_traffic, recorded_traffic, train_backbone
from tests.support.loop import LoopResult, run_loop
from tests.support.original import original_mar
from tests.support.served import served_model
from tests.support.timing import cpu_ratio

N_RECORD, N_MEASURE = 2500, 2000
"""More records would only show more variants of the same digits, which a certificate takes for other contents."""
OPTIONS = TrainingOptions(search=None)  # a search takes longer than this demonstration may
CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\nearly_exit:\n  seal_after_s: 5\n"


def main() -> None:
    restart_with_allocator()
    raise_on_terminate()
    started = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {line}", flush=True)

    log("training a small ResNet on 900 digits that the traffic never shows")
    weights = train_backbone().state_dict()
    (record, _), measure = recorded_traffic(N_RECORD, seed=1), measured_traffic(N_MEASURE, seed=2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        original = original_mar(folder / "original", "digits", "digits_resnet.py", "digits_handler.py", weights, CONFIG)
        result = run_loop(original, folder, [one.body for one in record], [one.body for one in measure],
                          input_shape=(1, 32, 32), options=OPTIONS, log=log)
        full, exiting = served_model(result.recorder), served_model(result.exiting)
        with one_thread(), torch.no_grad():
            ratio = cpu_ratio(full, exiting, list(batches(measure, 8)))
    print(table(result, [str(one.label) for one in measure], ratio))
    log("stopped everything that was started")


def table(result: LoopResult, labels: list[str], cpu_time_ratio: float) -> str:
    """Return what the loop gained, for a reader."""
    report = result.report
    certificate = report.plan.certificate
    bound = f"certified <= {certificate.tolerance:.1%}" if certificate else "not certified"
    rows = [
        ("", "before", "after"),
        ("accuracy", f"{result.accuracy(result.before, labels):.2%}", f"{result.accuracy(result.after, labels):.2%}"),
        ("answers that differ", "", f"{result.disagreement:.2%}  ({bound})"),
        *((f"left at {name}", "", f"{share:.1%}") for name, share in result.hits().items()),
        ("FLOPs per request", "1.00", f"{report.deployed.flops:.2f}"),
        ("CPU time of the model, one thread", "1.00", f"{cpu_time_ratio:.2f}"),
        ("CPU ms per request, whole worker", f"{1000 * result.worker_cpu_s_before:.2f}",
         f"{1000 * result.worker_cpu_s_after:.2f}"),
        *((f"p{quantile} ms", f"{latency_ms(result.before, quantile / 100):.1f}",
           f"{latency_ms(result.after, quantile / 100):.1f}") for quantile in (50, 95)),
        ("requests failed", "", f"{failed(result.replies)} of {len(result.replies)}"),
    ]
    return "\n" + "\n".join(f"  {name:34} {before:>8}  {after}" for name, before, after in rows) + "\n"


if __name__ == "__main__":
    main()
