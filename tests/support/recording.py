"""Records of a backbone without a server: the handler's own bookkeeping over batches of input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.config import ServingConfig
from early_exit.handler.inference.forward import Live
from early_exit.handler.model import EarlyExitModel
from early_exit.handler.recording.format import ShardHeader
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.serving.isolation import Served
from early_exit.handler.serving.telemetry import Telemetry
from early_exit.handler.torchserve.metric_lines import ServingMetrics
from early_exit.training.data.preprocessing import worker_context


def record(backbone: Backbone, inputs: Tensor | Live, folder: Path, *, name: str = "model", first_request: int = 0,
           ids: Sequence[str] | None = None, bodies: Sequence[bytes] | None = None,
           layers: int = ServingConfig.layers, pool: int | str = ServingConfig.pool) -> None:
    """Serve (N, ...) inputs, one tensor or several, in full and record each row as a request of its own.

    With its body where bodies are given. Without ids of their own the requests are numbered.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    n_requests = len(tensors[0])
    names = ids or [f"request-{first_request + row}" for row in range(n_requests)]
    # One shard, so that nothing is dropped, however slow the disk is.
    config = ServingConfig(records_per_shard=n_requests, layers=layers, pool=pool)
    model = EarlyExitModel(backbone, sampling_rate=1.0, record_layers=config.layers, record_pool=config.pool_side)
    header = ShardHeader(name, "1.0", backbone.description.sha256, config.pool_side, model.layers)
    writer = RecordWriter(folder, header, config)
    context = worker_context(Path(), {"model": {"modelName": name, "handler": "none"}})
    metrics = ServingMetrics(context.metrics, name, "1.0")
    bookkeeper = Telemetry(model, "1.0", metrics, writer, keep_requests=bodies is not None)
    processor = context.request_processor[0]
    for start in range(0, n_requests, 64):
        batch = [one[start:start + 64] for one in tensors]
        with torch.no_grad():
            model(*batch)
        n_rows = len(batch[0])
        context.request_ids = dict(enumerate(names[start:start + n_rows]))
        context.request_processor = [processor] * n_rows
        data = [{"body": body} for body in bodies[start:start + 64]] if bodies is not None else [{}] * n_rows
        bookkeeper.note(Served(tuple(range(n_rows)), [None] * n_rows, model.take_served()), data, context)
    writer.close()
