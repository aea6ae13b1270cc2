"""How alike two requests are, by what the backbone says of them.

Neighbours that are alike, as frames of one scene are, are one block: evidence together. Training fixes what is alike
on records before those that certify (`training.selection.blocks`); the plan takes it along, so that the monitor counts
the same kind of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 3
"""Content changes where none of so many records is like any of so many before them."""
LEAST = 0.5
"""A block has at least so much of the usual length: what looks like a change sooner is one frame that went wrong."""
COUNTS_FULLY = 0.95
"""The share of earlier blocks that count with all that is in them; a larger block counts as the largest of those."""
_PREFIX = "likeness."
"""Begins the names of the tensors; those of heads have a slash in theirs."""


@dataclass(frozen=True)
class Likeness:
    """How records are compared, and for how long they stay alike."""

    mean: Tensor
    """(K,) of the states."""
    directions: Tensor
    """(K, D) what states are multiplied with, so that each of D components has the variance 1."""
    distance: float
    """Squared distance of components below which two records are alike."""
    length: float
    """Requests that a block usually has; 0 where each record is evidence of its own."""
    is_trend: bool = False
    """Whether likeness lasts for longer than a tenth of the records that it was fixed on."""

    def components(self, states: Tensor) -> Tensor:
        """Return the (N, D) float32 components of (N, K) states, the backbone's log-probabilities."""
        return (states.float() - self.mean) @ self.directions

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what can be stored beside the heads of a plan."""
        distance, length = (torch.tensor(value, dtype=torch.float64) for value in (self.distance, self.length))
        return {f"{_PREFIX}mean": self.mean.contiguous(), f"{_PREFIX}directions": self.directions.contiguous(),
                f"{_PREFIX}distance": distance, f"{_PREFIX}length": length}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Likeness | None:
        """Return what `to_tensors` gave, if it is among some tensors."""
        if f"{_PREFIX}mean" not in tensors:
            return None
        mean, directions, distance, length = (
            tensors[_PREFIX + name] for name in ("mean", "directions", "distance", "length"))
        return cls(mean, directions, float(distance), float(length))
