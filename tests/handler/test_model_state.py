"""A change of a model is noticed, also one that torch does not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.user_handler.model_state import ModelState


@pytest.mark.parametrize("weight", [
    torch.randn(300, 200), torch.randn(8, 3, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(()),
    torch.randn(3000).bfloat16(), torch.randn(30).half(), torch.tensor([True, False]), torch.arange(5000),
    torch.full((4,), torch.nan), torch.randn(4, dtype=torch.complex128),
], ids=lambda weight: f"{weight.dtype}, {tuple(weight.shape)}")
def test_a_write_through_data_is_noticed_where_numbers_are_compared(weight: Tensor) -> None:
    model = nn.Module()
    model.register_buffer("weight", weight.clone())
    state = ModelState(model, numbers=True)
    assert state.changes() == []
    model.weight.data.copy_(~weight if weight.dtype is torch.bool else torch.nan_to_num(weight) + 1)
    assert state.changes() == ["weight"]


def test_a_weight_whose_numbers_cannot_be_read_one_by_one_is_skipped() -> None:
    model = nn.ParameterDict({"plain": nn.Parameter(torch.zeros(2))})
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("elsewhere", torch.zeros(3, device="meta"))
    state = ModelState(model, numbers=True)
    assert state.changes() == []
    model["plain"].data.add_(1)
    assert state.changes() == ["plain"]
