"""What serving without exits costs: against the plain backbone on the same engine, and with full recording.

    python -m tests.benchmarks.overhead --json FILE

CPU time of the process (the writer's thread included), one thread for the model, interleaved, medians. Every request
brings 10 kB of its own; `recording_ratio_10_mb` is that of single requests that bring 10 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
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
from early_exit.handler.serving.worker import Worker
from early_exit.handler.torchserve.host import TorchServeHost
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.training.costs.profiling import one_thread
from tests.support.models.cifar_resnet18w32 import ResNet18W32
from tests.support.timing import cpu_ratio

BATCHES = (1, 8, 32)


def main() -> int:
    parser = argparse.ArgumentParser(description="What serving without exits costs.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    restart_with_allocator()
    torch.manual_seed(0)
    figures = {
        "resnet18w32_32px": measure(ResNet18W32(), (3, 32, 32), {1: 300, 8: 100, 32: 30}),
        "resnet50_224px": measure(torchvision.models.resnet50(weights=None), (3, 224, 224), {1: 40, 8: 11, 32: 5}),
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


def measure(model: nn.Module, input_shape: tuple[int, ...], n_rounds: dict[int, int]) -> dict[str, Any]:
    """Return the largest difference of the answers and the cost ratios by batch size."""
    backbone = Backbone.from_module(model.eval(), input_shape)
    plain, served = ENGINES[DEFAULT_ENGINE].unsplit(backbone), build_model(backbone)
    found: dict[str, Any] = {"max_error": 0.0, "no_exit_ratio": {}, "recording_ratio": {}, "recording_ratio_10_mb": {}}
    with tempfile.TemporaryDirectory() as scratch, one_thread(), torch.no_grad():
        for size in BATCHES:
            inputs = [torch.randn(size, *input_shape) for _ in range(4)]
            rounds = [inputs[number % 4] for number in range(n_rounds[size])]
            error = (backbone.graph(inputs[0]) - served(inputs[0])).abs().max().item()
            found["max_error"] = max(found["max_error"], error)
            without, recording = serving(backbone, size, None), serving(backbone, size, Path(scratch))
            found["no_exit_ratio"][size] = cpu_ratio(plain, served, rounds)
            found["recording_ratio"][size] = cpu_ratio(without, recording, rounds)
            if size == 1:
                large = [serving(backbone, 1, folder, body_bytes=10_000_000) for folder in (None, Path(scratch))]
                found["recording_ratio_10_mb"][size] = cpu_ratio(*large, rounds)
    return found


def serving(backbone: Backbone, size: int, records: Path | None, *,
            body_bytes: int = 10_000) -> Callable[[Tensor], None]:
    """Return what a worker does for a batch besides pre- and post-processing; with a folder it records all."""
    bodies = [random.Random(number).randbytes(body_bytes) for number in range(size)]
    config = ServingConfig(records=str(records) if records else None)
    model = build_model(backbone, sampling_rate=1.0 if records else 0.0, record_pool=config.pool_side,
                        record_layers=config.layers if records else 0)
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    manifest = {"model": {"modelName": "overhead", "handler": "none"}}
    context = Context("overhead", ".", manifest, size, None, ts.__version__, True, metrics, {})
    handler = Batches(model)
    worker = Worker(model, handler, HandlerContext(context, manifest, {}), config, TorchServeHost(context),
                    HandlerDescription())

    def serve(batch: Tensor) -> None:
        handler.batch = batch
        worker.step([Call(f"request-{number}", {"body": bytearray(body)}) for number, body in enumerate(bodies)])

    return serve


class Batches:
    """A handler that is given the batch beside the requests, so that nothing but the model is computed."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model
        self.batch = torch.empty(0)

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        self.model(self.batch)
        return [None] * len(data)


if __name__ == "__main__":
    sys.exit(main())
