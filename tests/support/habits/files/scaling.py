"""A layer that a handler puts in front of its model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Scale(nn.Module):
    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation
