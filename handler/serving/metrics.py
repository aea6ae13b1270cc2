"""The metrics of a version, reported by any host."""

from __future__ import annotations

from collections import Counter

from early_exit.handler.exits.switch import Position
from early_exit.handler.model.assembly import Assembly
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.protocol import FULL
from early_exit.handler.serving.host import Host, MetricKind
from early_exit.handler.serving.isolation import Served

STAGE_REPORT_S = 0.1
"""Stage times are reported for at most one batch in this many seconds, because a line of output for each batch would
cost too much."""


class ServingMetrics:
    """Counts requests, records and failures."""

    def __init__(self, host: Host, assembly: Assembly) -> None:
        """Register the metrics.

        Args:
            host: reports the metrics.
            assembly: the assembly of the version.
        """
        self._assembly = assembly
        self._answers = host.metric(MetricKind.COUNTER, "answers_total", "count", ["Exit"])
        self._written = host.metric(MetricKind.COUNTER, "records_written_total", "count")
        self._dropped = host.metric(MetricKind.COUNTER, "records_dropped_total", "count")
        self._not_finite = host.metric(MetricKind.COUNTER, "records_not_finite_total", "count")
        self._shadow = host.metric(MetricKind.COUNTER, "shadow_samples_total", "count")
        self._anytime = host.metric(MetricKind.COUNTER, "anytime_answers_total", "count")
        self._refused = host.metric(MetricKind.COUNTER, "items_refused_total", "count")
        self._rows_unknown = host.metric(MetricKind.GAUGE, "rows_unknown", "bool", ["Because"])
        self._side_errors = host.metric(MetricKind.COUNTER, "side_errors_total", "count", ["Kind"])
        self._level = host.metric(MetricKind.GAUGE, "monitor_step", "count")
        self._samples = host.metric(MetricKind.GAUGE, "monitor_samples", "count")
        self._wealth = host.metric(MetricKind.GAUGE, "monitor_wealth", "ratio")
        self._mean_loss = host.metric(MetricKind.GAUGE, "monitor_mean_loss", "ratio")
        self._bypassed = host.metric(MetricKind.GAUGE, "exits_bypassed", "bool", ["BatchSize"])
        self._switched = host.metric(MetricKind.GAUGE, "exits_switched", "count")
        self._seconds = host.metric(MetricKind.HISTOGRAM, "stage_seconds", "seconds", ["Stage"])
        for counter in (self._written, self._dropped, self._not_finite, self._shadow, self._anytime, self._refused):
            counter.update(0)  # a rate needs a first value
        self._stages_reported = 0.0
        self._was_bypassed: dict[int, bool] = {}

    def served(self, served: Served) -> None:
        """Count the requests and batches of one call of the user's handler."""
        if served.refused:
            self._refused.update(len(served.calls))
        for batch in served.batches:
            for stage, count in Counter(batch.answers.stages.tolist()).items():
                self._answers.update(count, self._assembly.exit_name(stage))
            if len(batch.answers.shadow):
                self._shadow.update(len(batch.answers.shadow))
            if len(batch.answers.anytime):
                self._anytime.update(len(batch.answers.anytime))
            self._stage_seconds(batch)

    def records(self, written: int, dropped: int) -> None:
        """Count records."""
        if written:
            self._written.update(written)
        if dropped:
            self._dropped.update(dropped)

    def not_finite(self, count: int) -> None:
        """Count requests that are not recorded because their scores are not finite and predict no class."""
        if count:
            self._not_finite.update(count)

    def monitor(self, state: MonitorState) -> None:
        """Report the state of the monitor."""
        evidence = state.evidence
        self._level.update(state.step)
        self._samples.update(evidence.n)
        self._wealth.update(evidence.wealth())
        self._mean_loss.update(evidence.lost / max(1, evidence.n))

    def bypassed(self, bypassed: dict[int, bool]) -> None:
        """Report whether the exits are bypassed, for each batch size at which this has changed."""
        for size, is_bypassed in bypassed.items():
            if self._was_bypassed.get(size) != is_bypassed:
                self._bypassed.update(int(is_bypassed), str(size))
        self._was_bypassed = bypassed

    def switched(self, position: Position) -> None:
        """Report the operator's switch: 0 is on, -1 is off, and any other number is the lowest fallback level."""
        self._switched.update(-1 if position.least_level is None else position.least_level)

    def rows_unknown(self, because: str) -> None:
        """Report that for some or all batches it is not known which rows belong to which request."""
        self._rows_unknown.update(1, because)

    def side_errors(self, kind: str, count: int) -> None:
        """Count failures of side work, such as records or the monitor."""
        self._side_errors.update(count, kind)

    def _stage_seconds(self, batch: ServedBatch) -> None:
        if not batch.answers.stage_seconds or batch.time - self._stages_reported < STAGE_REPORT_S:
            return
        self._stages_reported = batch.time
        for number, seconds in enumerate(batch.answers.stage_seconds):
            stage = number if number < len(self._assembly.layers) else FULL
            self._seconds.update(seconds, self._assembly.exit_name(stage))
