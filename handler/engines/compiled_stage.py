"""A stage as an engine executes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CACHED = 2**19
"""The number of floats that fit into the cache of a core."""
Read = Callable[[Tensor], Tensor]
"""Converts what an engine passes on to the (B, ...) float32 activation that heads read and records hold. What is passed
on in float32 is not changed."""


def read_and_pool(x: Tensor, read: Read, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `pool(read(x))`, the pooled (B, ...) activation, in less time."""
    if x.dtype is torch.float32:
        return pool(x)
    if x.is_cuda:  # on a GPU, pooling sums in float32 whatever the dtype
        return read(pool(x))
    # Only a few rows are read at a time, because the floats of a whole batch would leave the cache before pooling.
    return torch.cat([pool(read(rows)) for rows in torch.split(x, max(1, _CACHED // max(1, x[:1].numel())))])


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operations on a device compute in the dtypes of their inputs.

    A handler may call its model under `torch.autocast`. What follows the model's own operations there, such as exit
    heads, must compute as it did in training.
    """
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@dataclass(frozen=True)
class CompiledStage:
    """A stage as an engine compiled it."""

    module: nn.Module
    """Takes the tensors that enter the stage as arguments and returns a tuple of those that leave it, each with one row
    per item. The last stage returns float32 scores."""
    read: Read = Tensor.float
    """Converts the first tensor that the module returns to float32. If the module computes under a handler's autocast,
    that tensor has half precision."""
