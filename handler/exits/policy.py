"""The decision whether an item may leave at an exit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from early_exit.handler.errors import PlanError

ExitPolicy = Callable[[Tensor], Tensor]
"""Any callable from (B, K) head logits to (B,) bool: which rows leave here."""


@dataclass(frozen=True)
class ConfidencePolicy:
    """Leave when the largest calibrated probability reaches a threshold (the paper's Algorithm 1)."""

    temperature: float
    """T > 0 of softmax(logits / T)."""
    threshold: float
    """Least confidence that leaves; above 1 nobody does."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise PlanError(f"temperature must be above 0, got {self.temperature}")

    def __call__(self, logits: Tensor) -> Tensor:
        return self.confidence(logits) >= self.threshold

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the (B,) calibrated probability of each row's most likely class."""
        calibrated = logits if self.temperature == 1 else logits / self.temperature
        return calibrated.softmax(dim=1).amax(dim=1)
