"""TorchServe's metrics address: the text of Prometheus, with the exits' metrics and its own."""

from __future__ import annotations

import re
from collections import defaultdict

from early_exit.archiver.version_metrics import Scrape, VersionMetrics
from early_exit.handler.protocol import METRIC_PREFIX

_MONITOR = f"{METRIC_PREFIX}monitor_"
_REQUESTS, _MICROSECONDS = "ts_inference_requests", "ts_inference_latency_microseconds"


def read_metrics(text: str) -> Scrape:
    """Read the Prometheus text; TorchServe counts requests that name no version under `NO_VERSION`.

    Raises:
        ValueError: the text has another format.
    """
    # This is imported here, because only the gateway reads metrics, and it is an extra.
    from prometheus_client.parser import text_string_to_metric_families

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
                elif name == f"{METRIC_PREFIX}exits_switched":
                    version.switched = value
                elif name.startswith(_MONITOR):
                    version.monitor[name.removeprefix(_MONITOR)] = value
            elif name.startswith((_REQUESTS, _MICROSECONDS)) and not name.endswith("_created"):
                version = scrape[labels["model_name"]][labels["model_version"]]
                if name.startswith(_REQUESTS):
                    version.requests += value
                else:
                    version.seconds += value / 1e6
    return scrape


def named_requests(text: str, model: str, version: str) -> float:
    """Return the number of requests in the Prometheus text that named a version.

    It is read without a library, because rolls must work where the extra of the gateway is not installed.
    """
    counts = re.findall(rf"^{_REQUESTS}(?:_total)?\{{(.*)\}} (\S+)", text, re.MULTILINE)
    return sum(float(count) for labels, count in counts
               if f'model_name="{model}",' in f"{labels}," and f'model_version="{version}",' in f"{labels},")
