"""How the stages of a backbone are executed.

An engine turns stages, graphs of ATen operations on one or several live tensors, into modules that take and return
the same. It is chosen once for an archive; what it does to the weights is done when they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from early_exit.handler.fold import fold


@dataclass(frozen=True)
class Engine:
    """One way to execute stages."""

    name: str
    compile: Callable[[Sequence[fx.GraphModule]], list[nn.Module]]
    """Stages in order -> for each a module of the same inputs and outputs."""
    arrange: Callable[[Tensor], Tensor]
    """(B, ...) activation -> the same in the memory format and dtype in which these stages hand it on."""
    max_probe_error: float
    """Largest difference from the scores stored in an archive, relative to the largest score, that other processors
    make; a damaged weight shows up far above it."""

    def unsplit(self, backbone: fx.GraphModule) -> nn.Module:
        """Return a whole backbone as this engine executes it: what exits are compared with."""
        [whole] = self.compile([backbone])
        return whole


def _as_exported(stages: Sequence[fx.GraphModule]) -> list[nn.Module]:
    return list(stages)


def _folded(stages: Sequence[fx.GraphModule]) -> list[nn.Module]:
    return [fold(stage) for stage in stages]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


DEFAULT_ENGINE = "folded"
ENGINES = {engine.name: engine for engine in (
    Engine("folded", _folded, _channels_last, max_probe_error=1e-3),
    Engine("eager", _as_exported, lambda x: x, max_probe_error=1e-3),
)}
"""folded: batch norms in the convolutions, channels_last, fp32: the plain backbone's answers up to rounding.
eager: the operations as they were exported: the plain backbone's answers bit for bit."""
