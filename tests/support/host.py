"""A host in memory, without a server and without TorchServe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.serving.host import MetricKind
from early_exit.handler.serving.worker import Worker
from early_exit.handler.user_handler.context import HandlerContext, ToolContext
from early_exit.handler.user_handler.description import HandlerDescription

Labelled = tuple[str, ...]


class MemoryMetric:
    """A metric that keeps the last value, or for a counter the sum, by label values."""

    def __init__(self, kind: MetricKind) -> None:
        self.kind = kind
        self.values: Counter[Labelled] = Counter()

    def update(self, value: float, *label_values: str) -> None:
        total = self.values[label_values] if self.kind is MetricKind.COUNTER else 0
        self.values[label_values] = total + value  # type: ignore[assignment]


class MemoryHost:
    """A `Host` that keeps metrics in memory."""

    device = torch.device("cpu")

    def __init__(self, model: str = "model", version: str = "1.0", *, folder: str = ".", batch_size: int = 8,
                 model_config: Mapping[str, Any] | None = None) -> None:
        self.model, self.version, self.batch_size = model, version, batch_size
        self.model_config = model_config or {}
        self.context = ToolContext(model, folder, batch_size=batch_size)
        self.metrics: dict[str, MemoryMetric] = {}

    def metric(self, kind: MetricKind, name: str, unit: str, labels: Sequence[str] = ()) -> MemoryMetric:
        self.metrics[name] = MemoryMetric(kind)
        return self.metrics[name]

    def value(self, name: str, *label_values: str) -> float:
        """Return the current value of a metric."""
        return self.metrics[name].values[label_values]


class RowsHandler:
    """A handler whose requests carry a row of each of the model's inputs in a header."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        inputs = [torch.stack(rows) for rows in zip(*(context.get_request_header(number, "rows")
                                                      for number in range(len(data))))]
        with torch.no_grad():
            self.model(*inputs)
        return ["done"] * len(data)


def worker_of(model: EarlyExitModel, handler: Any = None, config: ServingConfig | None = None,
              host: MemoryHost | None = None, description: HandlerDescription | None = None) -> Worker:
    """Return a worker for a given model and handler, without an archive."""
    host = host or MemoryHost()
    context = HandlerContext(host.context, {"model": {"modelName": host.model}}, host.model_config)
    return Worker(model, handler or RowsHandler(model), context, config or ServingConfig(), host,
                  description or HandlerDescription())


def calls_of_rows(inputs: Sequence[torch.Tensor], ids: Sequence[str], bodies: Sequence[bytes] | None = None
                  ) -> list[Call]:
    """Return a call of `RowsHandler` for each row of (B, ...) inputs. The body is given, or holds the row's values."""
    return [Call(id_, {"body": bodies[row] if bodies else b"".join(x[row].numpy().tobytes() for x in inputs)},
                 {"rows": tuple(x[row] for x in inputs)}) for row, id_ in enumerate(ids)]
