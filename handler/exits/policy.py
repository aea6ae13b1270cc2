"""The decision whether an item may leave at an exit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from early_exit.handler.errors import PlanError

ExitPolicy = Callable[[Tensor], Tensor]
"""Any callable from (B, K) head logits to (B,) bool: which rows leave here. The forward pass needs nothing else."""
NEVER = 2.0
"""A threshold that no confidence reaches."""


@dataclass(frozen=True)
class PlannedPolicy(ABC):
    """The policy of an exit in a plan: it defines the exit's answers, which rows leave, and how likely errors are.

    A policy must compute every result row by row, from (B, K) logits alone, because a GPU captures the computation once
    and replays it. To add a policy, put its class into `POLICIES`. A policy with values of its own also defines
    `fitted`.
    """

    temperature: float
    """The temperature T > 0; calibrated logits are logits / T."""
    threshold: float
    """The lowest confidence at which a row leaves; above 1, no row does."""

    kind: ClassVar[str]
    """The name of the policy in a plan."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise PlanError(f"temperature must be above 0, got {self.temperature}")

    @classmethod
    def fitted(cls, temperature: float, logits: Tensor, teacher: Tensor) -> PlannedPolicy:
        """Return the policy of a head, with a threshold that no row reaches.

        Args:
            temperature: the temperature that calibrates the logits.
            logits: (N, K) head logits on records that the head was not trained on.
            teacher: (N,) classes that the backbone predicted for the same records.
        """
        return cls(temperature, NEVER)

    @abstractmethod
    def confidence(self, logits: Tensor) -> Tensor:
        """Return the (B,) confidences, in [0, 1], to compare with the threshold. They depend on `answers` only."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return (B,) bool: which rows leave."""
        return self.confidence(logits) >= self.threshold

    def answers(self, logits: Tensor) -> Tensor:
        """Return the (B, K) calibrated logits that an exit answers with."""
        return logits if self.temperature == 1 else logits / self.temperature

    def error_chance(self, logits: Tensor) -> Tensor:
        """Return the (B,) calibrated probabilities that the answer's class is not the backbone's."""
        return 1 - self.answers(logits).softmax(dim=1).amax(dim=1)

    def on_answers(self) -> PlannedPolicy:
        """Return the policy that makes the same decisions on `answers(logits)`, for a head that computes these."""
        return replace(self, temperature=1.0)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class ConfidencePolicy(PlannedPolicy):
    """Leave when the largest calibrated probability reaches a threshold (the paper's Algorithm 1)."""

    kind: ClassVar[str] = "confidence"

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the (B,) calibrated probability of each row's most likely class."""
        return self.answers(logits).softmax(dim=1).amax(dim=1)


POLICIES: dict[str, type[PlannedPolicy]] = {ConfidencePolicy.kind: ConfidencePolicy}
"""The policies that a plan may use, by their kind."""


def policy_class(kind: str) -> type[PlannedPolicy]:
    """Return the registered policy of a kind.

    Raises:
        PlanError: this version has no policy of that kind.
    """
    if kind not in POLICIES:
        raise PlanError(f"expected one of the policies {', '.join(POLICIES)}, found {kind!r}: does it come from a "
                        "newer version of early-exit-torchserve?")
    return POLICIES[kind]


def policy_of(data: Mapping[str, Any]) -> PlannedPolicy:
    """Read the output of `PlannedPolicy.to_json`; without a kind, the policy is a `ConfidencePolicy`.

    Raises:
        PlanError: this version has no policy of that kind, or the policy needs other values.
    """
    kind = data.get("kind", ConfidencePolicy.kind)
    policy = policy_class(kind)
    values = {name: value for name, value in data.items() if name != "kind"}
    needed = {field.name for field in fields(policy)}
    if values.keys() != needed:
        raise PlanError(f"expected {', '.join(sorted(needed))} of a policy by {kind}, found "
                        f"{', '.join(sorted(values)) or 'nothing'}")
    return policy(**values)
