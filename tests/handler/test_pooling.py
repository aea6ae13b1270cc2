"""Pooling is compared with torch's own, which is slow on a CPU but correct."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from early_exit.handler.backbone.pooling import pool_activation, pooled_shape


@settings(max_examples=60)
@given(height=st.integers(1, 40), width=st.integers(1, 40), side=st.sampled_from([1, 2, 4, 8]))
def test_maps_are_pooled_as_adaptive_avg_pool_does(height: int, width: int, side: int) -> None:
    maps = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    pooled = pool_activation(maps, side)
    expected = functional.adaptive_avg_pool2d(maps, (min(side, height), min(side, width)))
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    assert pooled.shape[1:] == pooled_shape((3, height, width), side)


@settings(max_examples=30)
@given(height=st.sampled_from([16, 28, 30, 32, 56]), width=st.sampled_from([28, 30, 56]), side=st.sampled_from([1, 4]))
def test_channels_last_maps_are_pooled_alike(height: int, width: int, side: int) -> None:
    maps = torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(height * 57 + width))
    pooled = pool_activation(maps.to(memory_format=torch.channels_last), side)
    torch.testing.assert_close(pooled, pool_activation(maps, side), atol=1e-5, rtol=1e-5)


def test_tokens_become_the_first_and_the_mean() -> None:
    tokens = torch.randn(2, 7, 5)
    pooled = pool_activation(tokens, 4)
    assert torch.equal(pooled[:, 0], tokens[:, 0])
    torch.testing.assert_close(pooled[:, 1], tokens.mean(dim=1))
