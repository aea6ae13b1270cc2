"""How alike two requests are, measured by the backbone's output.

Neighbouring records that are alike, such as frames of one scene, form a block. Where they are mixed with others, as the
frames of several cameras are, all requests of a period form a block, and every second block counts. Training fixes the
measure on records older than those that certify (`training.selection.likeness`). The plan contains it, so that the
monitor forms the same kind of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 3
"""The content changes where none of this many records is like any of the same number of records before them."""
LEAST = 0.5
"""A block has at least this share of the usual length: a change that seems to come sooner is a single odd frame."""
COUNTS_FULLY = 0.95
"""A block that is larger than this share of the earlier blocks counts as the largest of those."""
_NUMBERS = ("distance", "length", "longest")
_PREFIX = "likeness."
"""The prefix of the names of the tensors; the names of the heads' tensors contain a slash."""


@dataclass(frozen=True)
class Likeness:
    """How records are compared, and for how long they stay alike."""

    mean: Tensor
    """(K,) mean of the states."""
    directions: Tensor
    """(K, D) matrix that states are multiplied by, so that each of the D components has the variance 1."""
    distance: float
    """Squared distance of components below which two records are alike; 0 if blocks are periods."""
    length: float
    """The usual number of requests in a block; 0 if each record is a block of its own."""
    longest: float = math.inf
    """The largest number of requests in a block: a longer one is cut."""

    @property
    def is_periodic(self) -> bool:
        """Whether blocks are periods, of which every second one counts."""
        return self.length > 0 and self.distance == 0

    def components(self, states: Tensor) -> Tensor:
        """Return the (N, D) float32 components of (N, K) states, the backbone's log-probabilities."""
        return (states.float() - self.mean) @ self.directions

    def to_tensors(self) -> dict[str, Tensor]:
        """Return tensors that can be stored beside the heads of a plan."""
        numbers = {f"{_PREFIX}{name}": torch.tensor(getattr(self, name), dtype=torch.float64) for name in _NUMBERS}
        return {f"{_PREFIX}mean": self.mean.contiguous(), f"{_PREFIX}directions": self.directions.contiguous(),
                **numbers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Likeness | None:
        """Read the output of `to_tensors`, or return None if `tensors` does not contain it."""
        if f"{_PREFIX}mean" not in tensors:
            return None
        return cls(tensors[f"{_PREFIX}mean"], tensors[f"{_PREFIX}directions"],
                   *(float(tensors[_PREFIX + name]) for name in _NUMBERS))
