"""What TorchServe's metrics say of the exits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from early_exit.handler.protocol import METRIC_PREFIX

_MONITOR = f"{METRIC_PREFIX}monitor_"
_REQUESTS, _MICROSECONDS = "ts_inference_requests", "ts_inference_latency_microseconds"


@dataclass
class VersionMetrics:
    """What was counted for one version of a model since its server was started."""

    answers: dict[str, float] = field(default_factory=dict)
    """Number of answers by exit."""
    shadow: float = 0.0
    """Number of answers of the shadow sample."""
    anytime: float = 0.0
    """Number of answers that came with what every exit would have said."""
    monitor: dict[str, float] = field(default_factory=dict)
    """The monitor's step, samples, wealth and mean_loss, where a certificate is watched."""
    bypassed: set[int] = field(default_factory=set)
    """Batch sizes at which the exits do not save time."""
    requests: float = 0.0
    """Number of requests that the server answered, whichever way they came."""
    seconds: float = 0.0
    """Seconds that all answered requests took together, waiting included."""

    def since(self, before: VersionMetrics) -> VersionMetrics:
        """Return what was counted between two looks; the rest is as it is now.

        A counter that has fallen belongs to a server that was started again.
        """
        def grown(now: float, then: float) -> float:
            return now - then if now >= then else now

        return VersionMetrics({name: grown(n, before.answers.get(name, 0.0)) for name, n in self.answers.items()},
                              grown(self.shadow, before.shadow), grown(self.anytime, before.anytime), self.monitor,
                              self.bypassed, grown(self.requests, before.requests), grown(self.seconds, before.seconds))


Scrape = Mapping[str, Mapping[str, VersionMetrics]]
"""Metrics by model and version."""


def read_metrics(text: str) -> Scrape:
    """Read the Prometheus text.

    Raises:
        ValueError: it is none.
    """
    scrape: dict[str, dict[str, VersionMetrics]] = defaultdict(lambda: defaultdict(VersionMetrics))
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name.startswith(METRIC_PREFIX):
                version = scrape[labels["ModelName"]][labels["ModelVersion"]]
                if name == f"{METRIC_PREFIX}answers_total":
                    version.answers[labels["Exit"]] = version.answers.get(labels["Exit"], 0.0) + value
                elif name == f"{METRIC_PREFIX}shadow_samples_total":
                    version.shadow += value
                elif name == f"{METRIC_PREFIX}anytime_answers_total":
                    version.anytime += value
                elif name == f"{METRIC_PREFIX}exits_bypassed" and value:
                    version.bypassed.add(int(labels["BatchSize"]))
                elif name.startswith(_MONITOR):
                    version.monitor[name.removeprefix(_MONITOR)] = value
            elif name.startswith((_REQUESTS, _MICROSECONDS)) and not name.endswith("_created"):
                version = scrape[labels["model_name"]][labels["model_version"]]
                if name.startswith(_REQUESTS):
                    version.requests += value
                else:
                    version.seconds += value / 1e6
    return scrape
