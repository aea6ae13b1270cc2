"""A backbone for vectors, whose requests leave early easily and whose exit heads train quickly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from tests.support.models.spread_model import Residual

N_RECORDS = 3000


def recorded_inputs() -> Tensor:
    """Return the (N_RECORDS, 16) inputs of the requests request-0, request-1 and so on."""
    return torch.randn(N_RECORDS, 16, generator=torch.Generator().manual_seed(1))


def residual_backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(*(Residual() for _ in range(6)), nn.Linear(16, 4)), (16,))
