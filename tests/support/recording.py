"""Records of a backbone without a server: the handler's own bookkeeping over batches of input."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.backbone import Backbone
from early_exit.handler.bookkeeping import Bookkeeper
from early_exit.handler.config import ServingConfig
from early_exit.handler.isolation import Served
from early_exit.handler.metrics import ServingMetrics
from early_exit.handler.recorder import RecordWriter
from early_exit.handler.records import ShardHeader
from early_exit.handler.served import ServedModel
from early_exit.training.requests import worker_context


def record(backbone: Backbone, inputs: Tensor, folder: Path, *, name: str = "model", first_request: int = 0) -> None:
    """Serve (N, ...) inputs in full and record each as a request of its own."""
    config = ServingConfig(records_per_shard=len(inputs))  # nothing is dropped, however slow the disk is
    model = ServedModel(backbone, sampling_rate=1.0, record_pool=config.pool, record_layers=config.layers)
    header = ShardHeader(name, "1.0", backbone.description.sha256, config.pool, model.layers)
    writer = RecordWriter(folder, header, config)
    context = worker_context(Path(), {"model": {"modelName": name, "handler": "none"}})
    metrics = ServingMetrics(context.metrics, name, "1.0")
    bookkeeper = Bookkeeper(model, "1.0", metrics, writer, keep_requests=False)
    processor = context.request_processor[0]
    for start in range(0, len(inputs), 64):
        batch = inputs[start:start + 64]
        with torch.no_grad():
            model(batch)
        n_rows = len(batch)
        context.request_ids = {row: f"request-{first_request + start + row}" for row in range(n_rows)}
        context.request_processor = [processor] * n_rows
        bookkeeper.note(Served(tuple(range(n_rows)), [None] * n_rows, model.take_served()), [{}] * n_rows, context)
    writer.close()
