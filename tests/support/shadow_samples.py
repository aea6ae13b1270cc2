"""Shadow samples of which only the losses matter."""

from __future__ import annotations

from collections.abc import Sequence

from early_exit.handler.monitor.blocks import Sample


def samples_of(losses: Sequence[float], level: int = 0) -> list[Sample]:
    """Return samples that were answered at a fallback level, each with a different content."""
    return [Sample(level, loss) for loss in losses]
