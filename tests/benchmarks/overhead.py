"""What serving without exits costs compared with the plain backbone on the same engine, and what recording costs.

    python -m tests.benchmarks.overhead --json FILE

All times are CPU times of the process, with one thread for the model. `no_exit_ratio` is the median over interleaved
rounds. `recording_ratio` is a ratio of sums over whole shards. One arm serves the requests of a shard and records them
all; its time ends when the writer has written that shard. The other arm serves the same requests without recording. The
arms take turns. So the recording arm contains all the work of recording, the writer's thread included. Each request has
a body of 10 kB; `recording_ratio_10_mb` is the ratio for single requests with bodies of 10 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torchvision
import ts
from torch import Tensor, nn
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.recording.format import list_shards
from early_exit.handler.serving.worker import Worker
from early_exit.handler.torchserve.host import TorchServeHost
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.training.costs.profiling import one_thread
from tests.benchmarks.report import conditions, save
from tests.support.models.cifar_resnet18w32 import ResNet18W32
from tests.support.served import as_in_service
from tests.support.timing import interleaved, median_ratio, ratio_of_sums

BATCHES = (1, 8, 32)
_BEGINNING = 16
"""The number of first bytes of a body that identify its request."""


def main() -> int:
    parser = argparse.ArgumentParser(description="What serving without exits costs.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), metavar="MODEL",
                        help="to measure (all of %(choices)s)")
    parser.add_argument("--records-per-shard", type=int, default=ServingConfig.records_per_shard, metavar="N",
                        help="(%(default)s)")
    options = parser.parse_args()
    restart_with_allocator()
    torch.manual_seed(0)
    run = conditions({**vars(options), "shards": {name: MODELS[name].n_shards for name in options.models},
                      "threads_of_model_times": 1})
    figures: dict[str, Any] = {}
    for name in options.models:
        figures[name] = measure(MODELS[name], options.records_per_shard)
        save(options.json, run, figures)
    print(json.dumps(figures, indent=1))
    return 0


@dataclass(frozen=True)
class Measured:
    """A model that is measured, with any weights, and how long."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    """The shape of one item."""
    n_rounds: Mapping[int, int]
    """The number of rounds of the comparison without recording, by batch size."""
    n_shards: int
    """The number of shards that are timed for each figure of recording. The recording arm goes first for half of them.
    One more shard is a warm-up."""


MODELS = {
    "resnet18w32_32px": Measured(ResNet18W32, (3, 32, 32), {1: 300, 8: 100, 32: 30}, 40),
    "resnet50_224px": Measured(partial(torchvision.models.resnet50, weights=None), (3, 224, 224),
                               {1: 40, 8: 11, 32: 5}, 2)}


def measure(measured: Measured, n_records: int) -> dict[str, Any]:
    """Return the largest difference between answers, and the cost ratios by batch size.

    Args:
        measured: the model.
        n_records: the number of records of a shard.
    """
    input_shape, n_shards = measured.input_shape, measured.n_shards
    backbone = Backbone.from_module(measured.make().eval(), input_shape)
    plain, served = ENGINES[DEFAULT_ENGINE].unsplit(backbone), build_model(backbone)
    found: dict[str, Any] = {"max_error": 0.0, "no_exit_ratio": {}, "recording_ratio": {}, "recording_ratio_10_mb": {}}
    with one_thread(), torch.no_grad():
        for size in BATCHES:
            inputs = [torch.randn(size, *input_shape) for _ in range(4)]
            rounds = [inputs[number % 4] for number in range(measured.n_rounds[size])]
            error = (backbone.graph(inputs[0]) - served(inputs[0])).abs().max().item()
            found["max_error"] = max(found["max_error"], error)
            seconds = interleaved({"plain": plain, "served": as_in_service(served)}, rounds)
            found["no_exit_ratio"][size] = median_ratio(seconds["served"], seconds["plain"])
            found["recording_ratio"][size] = recording_ratio(backbone, inputs, n_shards, n_records)
            if size == 1:
                found["recording_ratio_10_mb"][size] = recording_ratio(backbone, inputs, n_shards, n_records,
                                                                       body_bytes=10_000_000)
    return found


def recording_ratio(backbone: Backbone, inputs: list[Tensor], n_shards: int, n_records: int, *,
                    body_bytes: int = 10_000) -> float:
    """Return the CPU time of serving whole shards with recording, divided by that without recording.

    Args:
        backbone: the backbone that serves.
        inputs: batches of one size, which are used in turn.
        n_shards: the number of shards that are timed.
        n_records: the number of records of a shard, a multiple of the batch size.
        body_bytes: the size of each request's body.
    """
    size = len(inputs[0])
    if n_records % size:
        raise ValueError(f"a shard of {n_records} records is no multiple of batches of {size}")
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch)
        bodies = [random.Random(number).randbytes(body_bytes) for number in range(size)]
        without, recording = (serving(backbone, bodies, folder, n_records) for folder in (None, records))

        def serve(step: Callable[[Tensor], None]) -> None:
            for number in range(n_records // size):
                step(inputs[number % len(inputs)])

        def record(shard: int) -> None:
            serve(recording)
            wait_for_shard(records, shard)

        shards = count(1)
        seconds = interleaved({"without": lambda _: serve(without), "recording": lambda _: record(next(shards))},
                              range(n_shards))
    return ratio_of_sums(seconds["recording"], seconds["without"])


def wait_for_shard(records: Path, n_shards: int, limit_s: float = 120.0) -> None:
    """Wait until so many shards are written and the writer has checked for old shards. Waiting takes no CPU time."""
    deadline = time.monotonic() + limit_s
    while len(list_shards(records)) < n_shards:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected {n_shards} shards in {records}, found {len(list_shards(records))}")
        time.sleep(0.02)
    time.sleep(0.1)


def serving(backbone: Backbone, bodies: list[bytes], records: Path | None,
            n_records: int) -> Callable[[Tensor], None]:
    """Return a function that does a worker's work for a batch, except for pre- and postprocessing.

    Args:
        backbone: the backbone that serves.
        bodies: the bodies of the requests of a batch.
        records: the folder in which all requests are recorded; if it is None, nothing is recorded.
        n_records: the number of records of a shard. A shard is written only when it is full.
    """
    config = ServingConfig(records=str(records) if records else None, records_per_shard=n_records, seal_after_s=3600)
    model = build_model(backbone, sampling_rate=1.0 if records else 0.0, record_pool=config.pool_side,
                        record_layers=config.layers if records else 0)
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    manifest = {"model": {"modelName": "overhead", "handler": "none"}}
    context = Context("overhead", ".", manifest, len(bodies), None, ts.__version__, True, metrics, {})
    handler = Batches(model, bodies)
    worker = Worker(model, handler, HandlerContext(context, manifest, {}), config, TorchServeHost(context),
                    HandlerDescription())

    def serve(batch: Tensor) -> None:
        handler.batch = batch
        worker.step([Call(f"request-{number}", {"body": bytearray(body)}) for number, body in enumerate(bodies)])

    return serve


class Batches:
    """A handler that gets the batch separately from the requests, so that it computes nothing but the model.

    Each request has its own row even if it is handled alone, since a worker records less of rows without a request.
    """

    def __init__(self, model: EarlyExitModel, bodies: list[bytes]) -> None:
        self.model = model
        self.batch = torch.empty(0)
        self._row_of = {body[:_BEGINNING]: row for row, body in enumerate(bodies)}

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        rows = [self._row_of[bytes(item["body"][:_BEGINNING])] for item in data]
        self.model(self.batch if len(rows) == len(self.batch) else self.batch[rows])
        return [None] * len(data)


if __name__ == "__main__":
    sys.exit(main())
