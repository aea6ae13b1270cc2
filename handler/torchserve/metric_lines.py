"""What a version reports about itself, through TorchServe's metrics."""

from __future__ import annotations

from typing import Any

from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.protocol import METRIC_PREFIX


class ServingMetrics:
    """Counters and a histogram that appear at TorchServe's metrics address."""

    def __init__(self, cache: Any, model: str, version: str) -> None:
        """Register the metrics with the `metrics` object of TorchServe's context."""
        from ts.metrics.metric_type_enum import MetricTypes

        self._own = [model, version]

        def metric(name: str, unit: str, kind: MetricTypes, *dimensions: str) -> Any:
            return cache.add_metric_to_cache(METRIC_PREFIX + name, unit,
                                             ["ModelName", "ModelVersion", *dimensions], kind)

        self._answers = metric("answers_total", "count", MetricTypes.COUNTER, "Exit")
        self._written = metric("records_written_total", "count", MetricTypes.COUNTER)
        self._dropped = metric("records_dropped_total", "count", MetricTypes.COUNTER)
        self._shadow = metric("shadow_samples_total", "count", MetricTypes.COUNTER)
        self._anytime = metric("anytime_answers_total", "count", MetricTypes.COUNTER)
        self._refused = metric("items_refused_total", "count", MetricTypes.COUNTER)
        self._step = metric("monitor_step", "count", MetricTypes.GAUGE)
        self._samples = metric("monitor_samples", "count", MetricTypes.GAUGE)
        self._wealth = metric("monitor_wealth", "ratio", MetricTypes.GAUGE)
        self._mean_loss = metric("monitor_mean_loss", "ratio", MetricTypes.GAUGE)
        self._bypassed = metric("exits_bypassed", "bool", MetricTypes.GAUGE, "BatchSize")
        # TorchServe's histogram buckets reach from 0.005 to 10, which suits seconds.
        self._seconds = metric("stage_seconds", "seconds", MetricTypes.HISTOGRAM, "Stage")
        for counter in (self._written, self._dropped, self._shadow, self._anytime, self._refused):
            counter.add_or_update(0, self._own)  # a rate needs a value to begin with

    def answered(self, exit_name: str, count: int) -> None:
        self._add(self._answers, count, exit_name)

    def refused(self, count: int) -> None:
        self._add(self._refused, count)

    def shadow_samples(self, count: int) -> None:
        self._add(self._shadow, count)

    def anytime_answers(self, count: int) -> None:
        self._add(self._anytime, count)

    def records(self, written: int, dropped: int) -> None:
        self._add(self._written, written)
        self._add(self._dropped, dropped)

    def monitor(self, state: MonitorState) -> None:
        evidence = state.evidence
        for metric, value in ((self._step, state.step), (self._samples, evidence.n), (self._wealth, evidence.wealth()),
                              (self._mean_loss, evidence.lost / max(1, evidence.n))):
            metric.add_or_update(value, self._own)

    def bypassed(self, batch_size: int, is_bypassed: bool) -> None:
        self._bypassed.add_or_update(int(is_bypassed), [*self._own, str(batch_size)])

    def stage(self, name: str, seconds: float) -> None:
        self._seconds.add_or_update(seconds, [*self._own, name])

    def _add(self, metric: Any, count: int, *dimensions: str) -> None:
        if count:
            metric.add_or_update(count, [*self._own, *dimensions])
