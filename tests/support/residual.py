"""A backbone of vectors that exits early easily, and is quick to train heads for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone

N_RECORDS = 3000


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.inner(x)


def recorded_inputs() -> Tensor:
    """Return the (N_RECORDS, 16) inputs of the requests request-0, request-1 and so on."""
    return torch.randn(N_RECORDS, 16, generator=torch.Generator().manual_seed(1))


def residual_backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(*(Residual() for _ in range(6)), nn.Linear(16, 4)), (16,))
