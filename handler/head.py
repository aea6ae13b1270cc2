"""A small classifier on an intermediate activation, built from a specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor, nn

from early_exit.handler.errors import PlanError
from early_exit.handler.pooling import pool_activation


@dataclass(frozen=True)
class HeadSpec:
    """The architecture of a head: pool, linear layers with ReLU, classifier."""

    pool: int = 4
    """Side to which feature maps are average-pooled."""
    widths: tuple[int, ...] = (64,)
    """Output widths of the linear layers before the classifier; empty for a linear classifier."""

    def __post_init__(self) -> None:
        if self.pool < 1 or any(width < 1 for width in self.widths):
            raise PlanError(f"a head's pool and widths must be at least 1, got {self}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadSpec:
        try:
            return cls(pool=int(data["pool"]), widths=tuple(int(width) for width in data["widths"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"expected a head with 'pool' and 'widths', found {data!r}") from error


class Head(nn.Module):
    """Maps an activation to class logits."""

    def __init__(self, spec: HeadSpec, shape: tuple[int, ...], n_classes: int) -> None:
        """Build an untrained head.

        Args:
            spec: the architecture.
            shape: one row of the activation: (C, H, W), (T, D) or (D,).
            n_classes: K.
        """
        super().__init__()
        self.spec = spec
        sizes = [prod(pooled_shape(shape, spec.pool)), *spec.widths]
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))

    def forward(self, activation: Tensor) -> Tensor:
        """Return (B, K) logits for a (B, ...) activation as the backbone computes it."""
        return self.classify(pool_activation(activation, self.spec.pool))

    def classify(self, pooled: Tensor) -> Tensor:
        """Return (B, K) logits for a (B, ...) activation that is pooled already."""
        logits: Tensor = self.layers(pooled.flatten(1))
        return logits


def pooled_shape(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Return the shape of one row after `pool_activation`."""
    if len(shape) == 3:
        return (shape[0], min(side, shape[1]), min(side, shape[2]))
    if len(shape) == 2:
        return (2, shape[1])
    return shape
