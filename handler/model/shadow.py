"""The shadow sample: rows that run to the end whatever the exits say, drawn independently of their input."""

from __future__ import annotations

import os

import torch
from torch import Tensor


class ShadowSampler:
    """Draws the rows that are recorded and watched."""

    def __init__(self, rate: float = 0.0, rate_without_exits: float | None = None) -> None:
        """Begin to draw.

        Args:
            rate: the probability that a row is drawn.
            rate_without_exits: the probability after `exits_are_off` was called; by default it does not change.
        """
        self.rate = rate
        """The current probability that a row is drawn."""
        self._rate_without_exits = rate if rate_without_exits is None else rate_without_exits
        # The system seeds the generator: workers must not draw the same sample, nor one that depends on the input.
        self._random = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "big"))

    def draw(self, n_rows: int) -> Tensor:
        """Return a (B,) bool mask of the rows that are drawn."""
        return torch.rand(n_rows, generator=self._random) < self.rate

    def exits_are_off(self) -> None:
        """Draw with the rate of a version without exits from now on."""
        self.rate = self._rate_without_exits
