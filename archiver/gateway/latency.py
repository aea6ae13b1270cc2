"""The latencies of answers that went over the gateway's WebSocket."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from early_exit.handler.protocol import FULL_NAME

_KEPT, _VERSIONS = 2000, 3
FIRST_MS, PER_DECADE, DECADES = 1.0, 10, 5
"""The bins are even on a logarithmic scale, from 1 ms to 100 s."""


class Latencies:
    """The milliseconds of the latest answers of the latest versions, separately for early and for full answers."""

    def __init__(self) -> None:
        self._ms: dict[str, dict[bool, deque[float]]] = {}

    def add(self, message: Mapping[str, Any]) -> None:
        """Note a message of the protocol. Answers with opinions are ignored, because opinions need a full pass."""
        if message["status"] != 200 or "version" not in message or "opinions" in message:
            return
        version = message["version"]
        if version not in self._ms:
            self._ms[version] = defaultdict(lambda: deque(maxlen=_KEPT))
            if len(self._ms) > _VERSIONS:
                del self._ms[next(iter(self._ms))]
        self._ms[version][message.get("exit", FULL_NAME) != FULL_NAME].append(message["latency_ms"])

    def distributions(self) -> list[dict[str, Any]]:
        """Return a distribution for each version and kind of answer."""
        return [{"version": version, "early": early, **distribution(list(values))}
                for version, kinds in self._ms.items() for early, values in kinds.items()]


def distribution(values: list[float]) -> dict[str, Any]:
    """Return the count, the median, the 95th percentile and the share in each bin of some milliseconds.

    >>> took = distribution([10.0, 10.5, 11.0, 2000.0])
    >>> took["n"], took["p50"], took["bins"][10], took["bins"][33]
    (4, 11.0, 0.75, 0.25)
    """
    ordered, bins = sorted(values), [0.0] * (PER_DECADE * DECADES)
    for value in ordered:
        place = math.floor(PER_DECADE * math.log10(max(value, FIRST_MS) / FIRST_MS))
        bins[min(place, len(bins) - 1)] += 1 / len(ordered)
    return {"n": len(ordered), "p50": _quantile(ordered, 0.5), "p95": _quantile(ordered, 0.95),
            "bins": [round(share, 4) for share in bins]}


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
