"""The pooling of an activation to the small tensor that records hold and heads read."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_LARGE_MAP = 256
_LARGE_CHANNELS_LAST_MAP = 784


Side = int | None
"""The side to which feature maps are pooled, in cells; None keeps whole activations."""


def pool_activation(activation: Tensor, side: Side) -> Tensor:
    """Return a small summary of each row of an activation.

    Args:
        activation: (B, C, H, W) feature maps, (B, T, D) tokens or (B, D) vectors.
        side: feature maps are average-pooled to at most (side, side); None returns the activation.

    Returns:
        (B, C, min(side, H), min(side, W)) for maps. (B, 2, D) for tokens: the first token, which is the class token if
        the model has one, and the mean of all tokens. Vectors are returned as they are.
    """
    if side is None:
        return activation
    if activation.dim() == 4:
        if max(activation.shape[2:]) <= side:
            return activation
        return _pool_maps(activation, min(side, activation.shape[2]), min(side, activation.shape[3]))
    if activation.dim() == 3:
        return torch.stack((activation[:, 0], activation.mean(dim=1)), dim=1)
    return activation


def pooled_shape(shape: tuple[int, ...], side: Side) -> tuple[int, ...]:
    """Return the shape of one row after `pool_activation`."""
    if side is not None and len(shape) == 3:
        return (shape[0], min(side, shape[1]), min(side, shape[2]))
    if side is not None and len(shape) == 2:
        return (2, shape[1])
    return shape


def _pool_maps(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Compute adaptive_avg_pool2d in less time.

    On a CPU, adaptive_avg_pool2d is not vectorised for contiguous maps, but matrix products are. It reads large
    channels_last maps at half the speed of sums. On a GPU, it takes three times as long as sums.
    """
    batch, channels, height, width = maps.shape
    divides = height % rows == 0 and width % columns == 0
    if maps.is_cuda and divides:
        # In channels_last order, which is fast: the result has the same memory layout as the summands.
        cells = torch.unflatten(torch.unflatten(maps.permute(0, 2, 3, 1), 2, (columns, -1)), 1, (rows, -1))
        means: Tensor = cells.mean(dim=(2, 4), dtype=torch.float32)
        return means.permute(0, 3, 1, 2)
    if maps.is_cuda or not maps.is_contiguous():
        windows = maps.permute(0, 2, 3, 1)
        if not (windows.is_contiguous() and height * width >= _LARGE_CHANNELS_LAST_MAP and divides):
            return torch.nn.functional.adaptive_avg_pool2d(maps, (rows, columns))
        sums = windows.view(batch, rows, height // rows, width, channels).sum(dim=2)
        sums = sums.view(batch, rows, columns, width // columns, channels).sum(dim=3)
        return (sums * (rows * columns / (height * width))).permute(0, 3, 1, 2)
    if height % rows == 0 and height * width > _LARGE_MAP:
        sums = maps.view(-1, height // rows, width).sum(dim=1)  # (batch * channels * rows, width)
        pooled = sums @ _averages(width, columns).to(maps.dtype) * (rows / height)
    else:
        pooled = maps.view(-1, height * width) @ _averages_2d(height, width, rows, columns).to(maps.dtype)
    return pooled.view(batch, channels, rows, columns)


@lru_cache(maxsize=256)
def _averages(size: int, count: int) -> Tensor:
    """Return the (size, count) matrix that averages adaptive_avg_pool's windows of a vector."""
    matrix = torch.zeros(size, count)
    for window in range(count):
        start, end = window * size // count, math.ceil((window + 1) * size / count)
        matrix[start:end, window] = 1 / (end - start)
    return matrix


@lru_cache(maxsize=256)
def _averages_2d(height: int, width: int, rows: int, columns: int) -> Tensor:
    """Return the (height * width, rows * columns) matrix that averages the windows of a map."""
    return torch.kron(_averages(height, rows), _averages(width, columns))
