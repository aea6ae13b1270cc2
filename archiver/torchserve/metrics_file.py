"""Completes a user's metrics file with the entries that TorchServe and the live page need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from early_exit.handler.errors import ConfigError
from early_exit.handler.files.private import replacing
from early_exit.training.text_files import read_yaml

_OURS = {"ts_inference_requests_total": "Count", "ts_inference_latency_microseconds": "Microseconds",
         "ts_queue_latency_microseconds": "Microseconds"}
"""Counters of TorchServe that the live page and the dashboard read, with their units."""
_LABELS = ("model_name", "model_version", "hostname")
_SERVER, _MODEL, _COUNTERS = "ts_metrics", "model_metrics", "counter"


class _Plain(yaml.SafeDumper):
    """Writes shared lists twice: TorchServe changes lists as it reads them, and would change a shared one twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def complete_metrics_file(users: Path, place: Path, log: Callable[[str], None]) -> Path:
    """Return the metrics file to serve with: the user's, or a copy with the entries that it lacks.

    TorchServe shows only the counters that its metrics file names, and starts no worker if the file has no metrics of
    models. The metrics of early exits need not be named, because TorchServe finds them by itself.

    Args:
        users: the user's file.
        place: the path of the copy.
        log: receives a line about the entries that were added.

    Raises:
        ConfigError: the user's file cannot be read, or is not a metrics file.
        OSError: the copy cannot be written.
    """
    metrics = read_yaml(users, "TorchServe's metrics file")
    if not isinstance(metrics, dict):
        raise ConfigError(f"expected {_SERVER} and {_MODEL} in the metrics file {users}, found {metrics!r:.80}")
    server, added = _section(metrics, _SERVER, users), []
    counters = server.get(_COUNTERS) or []
    named = {counter.get("name") for counter in counters if isinstance(counter, dict)}
    missing = [name for name in _OURS if name not in named]
    if missing:
        new = [{"name": name, "unit": _OURS[name], "dimensions": list(_LABELS)} for name in missing]
        metrics[_SERVER] = {**server, _COUNTERS: [*counters, *new]}
        added += missing
    if not _section(metrics, _MODEL, users):
        metrics[_MODEL] = {"gauge": [{"name": "PredictionTime", "unit": "ms", "dimensions": ["ModelName", "Level"]}]}
        added.append(f"PredictionTime of {_MODEL}")
    if not added:
        return users
    with replacing(place) as scratch:
        scratch.write_text(yaml.dump(metrics, Dumper=_Plain, sort_keys=False))
    log(f"{users} lacks {', '.join(added)}, which workers, the live page or the dashboard need: {place} has them, too")
    return place


def _section(metrics: dict[str, Any], name: str, users: Path) -> dict[str, Any]:
    section = metrics.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"expected kinds of metrics under {name} in {users}, found {section!r:.80}")
    return section
