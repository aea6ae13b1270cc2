"""How alike two requests are, measured by the backbone's output.

Neighbouring records that are alike, such as frames of one scene, form a block. If records that are alike are mixed with
others, such as the frames of several cameras, all requests of a period form a block, and every second block is skipped.
Training fixes the measure on records that are older than the records of the certificate
(`training.selection.likeness`). The plan contains the measure, so that the monitor forms the same kind of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 3
"""The number of records on each side of a border that are compared. The content changes at the border if no record on
one side is like any record on the other side."""
LEAST = 0.5
"""A block has at least this share of the usual length. If the content seems to change sooner, the reason is a single
odd frame."""
COUNTS_FULLY = 0.95
"""The share of blocks that count with their full size. Larger blocks count as much as the largest of these."""
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
        """Whether blocks are periods, of which every second one is skipped."""
        return self.length > 0 and self.distance == 0

    @property
    def most_requests(self) -> float:
        """The largest number of requests in a block; the usual one if blocks are periods."""
        return self.longest if math.isfinite(self.longest) else self.length

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
