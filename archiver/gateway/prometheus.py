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
    """Of one version of a model, since its server was started."""

    answers: dict[str, float] = field(default_factory=dict)
    """Count by exit."""
    shadow: float = 0.0
    """Answers of the shadow sample."""
    anytime: float = 0.0
    """Answers with every exit's opinion."""
    monitor: dict[str, float] = field(default_factory=dict)
    """step, samples, wealth and mean_loss, where a certificate is watched."""
    bypassed: set[int] = field(default_factory=set)
    """Batch sizes at which the exits do not save time."""
    requests: float = 0.0
    """All that TorchServe answered, whichever way they came."""
    seconds: float = 0.0
    """They took in all, waiting included."""

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
"""By model and version."""


def read_metrics(text: str) -> Scrape:
    """Read the Prometheus text.

    Raises:
        ValueError: it is none.
    """
    found: dict[str, dict[str, VersionMetrics]] = defaultdict(lambda: defaultdict(VersionMetrics))
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name.startswith(METRIC_PREFIX):
                one = found[labels["ModelName"]][labels["ModelVersion"]]
                if name == f"{METRIC_PREFIX}answers_total":
                    one.answers[labels["Exit"]] = one.answers.get(labels["Exit"], 0.0) + value
                elif name == f"{METRIC_PREFIX}shadow_samples_total":
                    one.shadow += value
                elif name == f"{METRIC_PREFIX}anytime_answers_total":
                    one.anytime += value
                elif name == f"{METRIC_PREFIX}exits_bypassed" and value:
                    one.bypassed.add(int(labels["BatchSize"]))
                elif name.startswith(_MONITOR):
                    one.monitor[name.removeprefix(_MONITOR)] = value
            elif name.startswith((_REQUESTS, _MICROSECONDS)) and not name.endswith("_created"):
                one = found[labels["model_name"]][labels["model_version"]]
                if name.startswith(_REQUESTS):
                    one.requests += value
                else:
                    one.seconds += value / 1e6
    return found
