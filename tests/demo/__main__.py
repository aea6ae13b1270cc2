"""`make demo`: the whole loop on scikit-learn's digits, with a table of what was gained at the end."""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.allocator import restart_with_allocator
from early_exit.training.command import raise_on_terminate
from early_exit.training.options import TrainingOptions
from tests.benchmarks.loop import settings_of, summarise
from tests.benchmarks.page.river import river_of
from tests.benchmarks.report import conditions, save
from tests.support.arms import ARMS
from tests.support.digits import batches, measured_traffic, recorded_once, train_backbone
from tests.support.documents import ROOT
from tests.support.gateway import gateway
from tests.support.loop import run_loop
from tests.support.models.demo_resnet import DemoResNet
from tests.support.original import original_mar

N_FOR_BACKBONE, N_STEPS, N_MEASURE = 600, 140, 2000
OPTIONS = TrainingOptions(search=None)  # a search would take too long for a demonstration
PICTURE = ROOT / "build" / "demo" / "river.svg"
CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\nearly_exit:\n  seal_after_s: 5\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.demo", description="The whole loop on scikit-learn's digits.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as well")
    options = parser.parse_args()
    restart_with_allocator()
    raise_on_terminate()
    started = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {line}", flush=True)

    @contextmanager
    def live_page(server: TorchServe) -> Iterator[None]:
        token = secrets.token_hex(24)
        with gateway(server.addresses, server.key_file, server.secret_file, store=server.model_store,
                     token=token) as address:
            log(f"ee-gateway  live page until the end: http://{address}/#token={token}")
            yield

    record, measure = recorded_once(1, N_FOR_BACKBONE), measured_traffic(N_MEASURE, 2, N_FOR_BACKBONE)
    run = conditions({**settings_of(OPTIONS, CONFIG), "steps": N_STEPS, "digits_of_the_backbone": N_FOR_BACKBONE,
                      "recorded": len(record), "measured": N_MEASURE})
    log(f"training a ResNet on {N_FOR_BACKBONE} digits that the traffic never shows")
    model = train_backbone(N_STEPS, n_digits=N_FOR_BACKBONE, kind=DemoResNet)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        original = original_mar(folder / "original", "digits", "demo_resnet.py", "digits_handler.py",
                                model.state_dict(), CONFIG)
        result = run_loop(original, folder, [one.body for one in record], [one.body for one in measure],
                          input_shape=(1, 32, 32), config=CONFIG, options=OPTIONS, log=log, beside=live_page)
        inputs = torch.cat(list(batches(measure, 8)))
        figures = summarise(result, [str(one.label) for one in measure], inputs, model)
    if options.json:
        save(options.json, run, figures)
    print(table(figures))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(river_of(figures, "Digits"))
    log(f"where the requests left, as a picture: {PICTURE}")
    log("stopped everything that was started")


def table(figures: Mapping[str, Any]) -> str:
    """Return a table of what the loop gained, for people to read."""
    of_exits, in_all = figures["vs_without_exits"], figures["vs_original"]
    bound = figures["certified_bound"]

    def time_of(ratios: Mapping[str, Any]) -> float:
        return float(ratios["cpu_time_ratio"])

    def each(name: str, digits: int) -> tuple[str, ...]:
        return tuple(f"{figures[name][arm]:.{digits}f}" for arm in ARMS)

    rows = [
        ("", "original", "ours, no exits", "ours, exits"),
        ("accuracy", f"{figures['accuracy_before']:.2%}",
         f"{figures['accuracy_after'] + of_exits['accuracy_loss']:.2%}", f"{figures['accuracy_after']:.2%}"),
        ("answers that differ", "", f"{figures['disagreement_without_exits']:.2%}",
         f"{figures['disagreement']:.2%}  ({f'certified <= {bound:.1%}' if bound else 'not certified'})"),
        *((f"left at {name}", "", "", f"{share:.1%}") for name, share in figures["hits"].items()),
        ("FLOPs per request", "1.00", f"{in_all['flops_ratio'] / of_exits['flops_ratio']:.2f}",
         f"{in_all['flops_ratio']:.2f}"),
        ("CPU time of the model, one thread", "1.00", f"{time_of(in_all) / time_of(of_exits):.2f}",
         f"{time_of(in_all):.2f}"),
        ("CPU ms per request, whole worker", *each("worker_cpu_ms_per_request", 2)),
        ("p50 ms", *each("p50_ms", 1)),
        ("p95 ms", *each("p95_ms", 1)),
        ("requests failed", "", "", f"{figures['failed']} of {figures['requests']}"),
    ]
    lines = [f"  {name:34} {first:>8}  {second:>14}  {third}" for name, first, second, third in rows]
    return "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
