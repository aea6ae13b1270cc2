"""A stage as an engine executes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_CACHED = 2**19
"""Numbers that fit into the cache of a core."""
Read = Callable[[Tensor], Tensor]
"""Makes of what an engine hands on the (B, ...) float32 activation that heads read and records keep."""


def read_as_it_is(x: Tensor) -> Tensor:
    """Read what travels in float32; a `Read`."""
    return x


def read_and_pool(x: Tensor, read: Read, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `pool` makes of the (B, ...) activation that `read` finds in x."""
    if read is read_as_it_is:
        return pool(x)
    if x.is_cuda:  # which adds up in float32 whatever it reads
        return read(pool(x))
    # A few rows at a time: the floats of a whole batch would leave the cache before they are pooled.
    return torch.cat([pool(read(rows)) for rows in torch.split(x, max(1, _CACHED // max(1, x[:1].numel())))])


@dataclass(frozen=True)
class CompiledStage:
    """What an engine made of a stage."""

    module: nn.Module
    """Takes the tensors that travel to it as arguments and returns a tuple of those that travel on, each with a row
    per item; the last stage returns float32 scores."""
    read: Read = read_as_it_is
    """Makes floats of the first tensor that the module returns."""
