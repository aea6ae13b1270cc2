"""TorchServe as a host: all facts about it are read from the context of TorchServe's worker process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from early_exit.handler.serving.host import Metric, MetricKind
from early_exit.handler.torchserve.metric_lines import MetricLines


class TorchServeHost:
    """The TorchServe that loaded this worker; a `Host`."""

    def __init__(self, context: Any) -> None:
        """Read the facts that do not change, and make the worker's GPU torch's current device.

        Args:
            context: TorchServe's `ts.context.Context`.
        """
        self.context = context
        self.model = str(context.model_name)
        self.version = str(context.manifest["model"].get("modelVersion", "1.0"))
        gpu = context.system_properties.get("gpu_id")
        on_gpu = gpu is not None and torch.cuda.is_available()
        self.device = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)  # streams and graphs are created on the current device
        self.batch_size = int(context.system_properties.get("batch_size", 1))
        self.model_config: Mapping[str, Any] = context.model_yaml_config or {}

    def metric(self, kind: MetricKind, name: str, unit: str, labels: Sequence[str] = ()) -> Metric:
        """Register a metric that appears at TorchServe's metrics address."""
        return MetricLines(self.context.metrics, kind, name, unit, labels, (self.model, self.version))
