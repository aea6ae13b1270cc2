"""What a server has counted for the versions of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NO_VERSION = "default"
"""Stands for the version of requests that named none, where a server counts them apart."""


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
    switched: float = 0.0
    """What the operator's switch is set to: 0 is on, -1 off, any other number the least fallback level."""
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
                              self.bypassed, self.switched, grown(self.requests, before.requests),
                              grown(self.seconds, before.seconds))


Scrape = Mapping[str, Mapping[str, VersionMetrics]]
"""Metrics by model and version."""
