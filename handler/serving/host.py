"""The interface of the server that a worker belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

import torch


class MetricKind(Enum):
    """How the values of a metric are combined."""

    COUNTER = "counter"
    """Values are added up."""
    GAUGE = "gauge"
    """The newest value replaces the earlier ones."""
    HISTOGRAM = "histogram"
    """Values are counted by size."""


class Metric(Protocol):
    """One metric of a version."""

    def update(self, value: float, *label_values: str) -> None:
        """Report a value.

        Args:
            value: the value, in the metric's unit.
            label_values: one for each label of the metric, in order.
        """


class Host(Protocol):
    """A server that hands calls to a worker."""

    @property
    def model(self) -> str:
        """The name under which the model is served."""

    @property
    def version(self) -> str:
        """The version that is served."""

    @property
    def device(self) -> torch.device:
        """The device that the worker computes on."""

    @property
    def batch_size(self) -> int:
        """The largest number of calls that the worker gets at once."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The parsed model-config.yaml of the archive; empty if it has none."""

    @property
    def context(self) -> Any:
        """The host's context, such as a `ToolContext`, from which the context of the user's handler is built."""

    def metric(self, kind: MetricKind, name: str, unit: str, labels: Sequence[str] = ()) -> Metric:
        """Register a metric of the version.

        Args:
            kind: how its values are combined.
            name: the name without its prefix.
            unit: "count", "ratio", "bool" or "seconds".
            labels: names of its labels, besides model and version.
        """
