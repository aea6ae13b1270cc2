"""An exit policy that is not part of the product, for tests that register it themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from early_exit.handler.exits.policy import NEVER, PlannedPolicy


@dataclass(frozen=True)
class EntropyPolicy(PlannedPolicy):
    """A request leaves if the entropy, as a share of its largest value log K, is low (BranchyNet)."""

    scale: float
    """The factor of the entropy, a value that only this policy has."""

    kind: ClassVar[str] = "entropy"

    @classmethod
    def fitted(cls, temperature: float, logits: Tensor, teacher: Tensor) -> EntropyPolicy:
        """Return the policy whose scale gives the least confident record a confidence of 0."""
        unscaled = cls(temperature, NEVER, scale=1.0)
        return cls(temperature, NEVER, scale=1 / (1 - unscaled.confidence(logits).min().item() + 1e-6))

    def confidence(self, logits: Tensor) -> Tensor:
        log_probabilities = self.answers(logits).log_softmax(dim=1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=1)
        return (1 - self.scale * entropy / math.log(logits.shape[1])).clamp(0, 1)
