"""The metrics of a server for the versions of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NO_VERSION = "default"
"""Stands for the version of requests that named none, if a server counts them separately."""


@dataclass
class VersionMetrics:
    """The metrics of one version of a model since its server was started."""

    answers: dict[str, float] = field(default_factory=dict)
    """The number of answers by exit."""
    shadow: float = 0.0
    """The number of answers of the shadow sample."""
    anytime: float = 0.0
    """The number of answers in anytime mode, which come with the answers of all exits."""
    monitor: dict[str, float] = field(default_factory=dict)
    """The monitor's step, samples, wealth and mean_loss, if a certificate is watched."""
    bypassed: set[int] = field(default_factory=set)
    """The batch sizes at which the exits do not save time."""
    switched: float = 0.0
    """The setting of the operator's switch: 0 is on, -1 is off, any other number is the least fallback level."""
    requests: float = 0.0
    """The number of requests that the server answered, through a gateway or directly."""
    seconds: float = 0.0
    """The sum of the seconds that all answered requests took, waiting included."""

    def since(self, before: VersionMetrics) -> VersionMetrics:
        """Return the counts between two scrapes; values that are not counters are those of the later scrape.

        A counter that has fallen belongs to a server that was restarted.
        """
        def grown(now: float, then: float) -> float:
            return now - then if now >= then else now

        return VersionMetrics({name: grown(n, before.answers.get(name, 0.0)) for name, n in self.answers.items()},
                              grown(self.shadow, before.shadow), grown(self.anytime, before.anytime), self.monitor,
                              self.bypassed, self.switched, grown(self.requests, before.requests),
                              grown(self.seconds, before.seconds))


Scrape = Mapping[str, Mapping[str, VersionMetrics]]
"""Metrics by model and version."""
