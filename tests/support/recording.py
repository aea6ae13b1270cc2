"""Records of a backbone, which a worker makes without a server, and the inputs that a handler makes from bodies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.config import ServingConfig
from early_exit.handler.inference.forward import Live
from early_exit.handler.model.loading import build_model
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.sample_request import BODY
from early_exit.training.data.preprocessing import Preprocessing
from early_exit.training.data.skipped import Skipped
from tests.support.host import MemoryHost, calls_of_rows, worker_of


def record(backbone: Backbone, inputs: Tensor | Live, folder: Path, *, name: str = "model", first_request: int = 0,
           ids: Sequence[str] | None = None, bodies: Sequence[bytes] | None = None,
           layers: int = ServingConfig.layers, pool: int | str = ServingConfig.pool) -> None:
    """Serve (N, ...) inputs, one tensor or several, with full answers, and record each row as a separate request.

    If bodies are given, each request is recorded with its body. If no IDs are given, the requests are numbered.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    n_requests = len(tensors[0])
    names = ids or [f"request-{first_request + row}" for row in range(n_requests)]
    # One shard holds all records, so that none is dropped, however slow the disk is.
    config = ServingConfig(records_per_shard=n_requests, layers=layers, pool=pool, records=str(folder.resolve()),
                           keep_requests=bodies is not None)
    model = build_model(backbone, sampling_rate=1.0, record_layers=config.layers, record_pool=config.pool_side)
    worker = worker_of(model, config=config, host=MemoryHost(name))
    for start in range(0, n_requests, 64):
        rows = slice(start, start + 64)
        replies = worker.step(calls_of_rows([x[rows] for x in tensors], names[rows], bodies and bodies[rows]))
        assert all(reply is not None and reply.body == "done" for reply in replies), replies
    worker.close()


def prepared(handler: Preprocessing, bodies: Sequence[bytes], model: BackboneDescription) -> Live:
    """Return the (N, ...) inputs that a handler gives its model for requests with N bodies."""
    skipped = Skipped()
    _, inputs = handler.model_inputs([KeptRequest({BODY: body}) for body in bodies], model, skipped)
    assert not skipped.counts, skipped.counts
    return inputs
