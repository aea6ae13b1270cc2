"""A metric in TorchServe's metrics cache, which writes each value as a log line that TorchServe's frontend reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from early_exit.handler.protocol import METRIC_PREFIX
from early_exit.handler.serving.host import MetricKind


class MetricLines:
    """One metric; a `Metric`. TorchServe's histogram buckets reach from 0.005 to 10, which suits seconds."""

    def __init__(self, cache: Any, kind: MetricKind, name: str, unit: str, labels: Sequence[str],
                 own: tuple[str, str]) -> None:
        """Register the metric.

        Args:
            cache: the `metrics` of TorchServe's context.
            kind: how its values are combined.
            name: the name without its prefix.
            unit: the unit of its values.
            labels: names of its labels, besides model and version.
            own: the names of model and version.
        """
        from ts.metrics.metric_type_enum import MetricTypes

        kinds = {MetricKind.COUNTER: MetricTypes.COUNTER, MetricKind.GAUGE: MetricTypes.GAUGE,
                 MetricKind.HISTOGRAM: MetricTypes.HISTOGRAM}
        self._own = own
        self._metric = cache.add_metric_to_cache(METRIC_PREFIX + name, unit, ["ModelName", "ModelVersion", *labels],
                                                 kinds[kind])

    def update(self, value: float, *label_values: str) -> None:
        """Report a value."""
        self._metric.add_or_update(value, [*self._own, *label_values])
