"""How the stages of a backbone are executed.

An engine cuts a backbone into stages and makes of each a module that maps the tensors that travel to it to those that
travel on. It is chosen once for an archive; what it does to the weights is done when they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.engines.bfloat16 import in_bfloat16
from early_exit.handler.engines.compiled_stage import CompiledStage, Read, read_as_it_is
from early_exit.handler.engines.fold import fold
from early_exit.handler.engines.fuse import fuse
from early_exit.handler.engines.openvino import compile_float, compile_int8, int8_digest
from early_exit.handler.errors import PlanError

Arrange = Callable[[Tensor], tuple[Tensor, Read]]


@dataclass(frozen=True)
class Engine:
    """One way to execute stages."""

    name: str
    compile: Callable[[Backbone, Sequence[str]], list[CompiledStage]]
    """Takes a backbone and the names of the cuts' values, as `split` does."""
    arrange: Arrange
    """(B, ...) float activation -> the same as it travels between these stages, and what reads it."""
    is_exact: bool
    """Whether its answers are the backbone's up to rounding, to 1e-4; else a certificate counts what it changes."""
    max_probe_error: float
    """Largest difference from the scores stored in an archive, relative to the largest score, that other processors
    make; a damaged weight shows up far above it."""
    on_gpu: bool = True
    """Whether it runs on a GPU, too."""
    digest: Callable[[Path], str] | None = None
    """Of what it has in an archive's folder, where that is more than the backbone."""

    def unsplit(self, backbone: Backbone) -> nn.Module:
        """Return a whole backbone as this engine executes it: what exits are compared with."""
        [whole] = self.compile(backbone, [])
        return whole.module

    def identity(self, folder: Path | None) -> str:
        """Return what records, plans and certificates belong to: the engine, and its own weights if it has any."""
        return self.name if self.digest is None or folder is None else f"{self.name}@{self.digest(folder)}"


def engine_of(identity: str) -> Engine:
    """Return the engine of that name or identity."""
    return ENGINES[identity.partition("@")[0]]


def are_alike(one: str, other: str) -> bool:
    """Tell whether records that were made on one engine say what the other computes; both are identities."""
    return one == other or (engine_of(one).is_exact and engine_of(other).is_exact)


def require_engine(planned: str, identity: str) -> None:
    """Check that a plan which was made on one engine may serve on another; both are identities.

    Raises:
        PlanError: the plan's heads and its certificate are about another one.
    """
    if not are_alike(planned, identity):
        raise PlanError(f"the plan was made on the engine {planned}, and its certificate counts what that one "
                        f"changes, but the archive is executed by {identity}: train on records of this archive")


def _as_exported(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    return [CompiledStage(stage) for stage in split(backbone.graph, boundaries)]


def _folded(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    return [CompiledStage(stage) for stage in _rewritten(backbone, boundaries)]


def _in_bfloat16(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    return in_bfloat16(_rewritten(backbone, boundaries))


def _rewritten(backbone: Backbone, boundaries: Sequence[str]) -> list[fx.GraphModule]:
    stages = [fold(stage) for stage in split(backbone.graph, boundaries)]
    is_nvidia = backbone.device.type == "cuda" and torch.version.cuda is not None
    return [fuse(stage) for stage in stages] if is_nvidia else stages


def _as_given(x: Tensor) -> tuple[Tensor, Read]:
    return x, read_as_it_is


def _channels_last(x: Tensor) -> tuple[Tensor, Read]:
    return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x), read_as_it_is


def _channels_last_bfloat16(x: Tensor) -> tuple[Tensor, Read]:
    return _channels_last(x)[0].bfloat16(), Tensor.float


def _integers(x: Tensor) -> tuple[Tensor, Read]:
    return (x * 255).byte(), Tensor.float


DEFAULT_ENGINE, EAGER = "folded", "eager"
INT8 = "openvino-int8"
ENGINES = {engine.name: engine for engine in (
    Engine("folded", _folded, _channels_last, is_exact=True, max_probe_error=1e-3),
    Engine("eager", _as_exported, _as_given, is_exact=True, max_probe_error=1e-3),
    Engine("bfloat16", _in_bfloat16, _channels_last_bfloat16, is_exact=False, max_probe_error=0.2),
    Engine("openvino", compile_float, _as_given, is_exact=True, max_probe_error=1e-3, on_gpu=False),
    Engine(INT8, compile_int8, _integers, is_exact=False, max_probe_error=0.5, on_gpu=False,
           digest=int8_digest),
)}
"""folded: batch norms in the convolutions, channels_last, fp32: the plain backbone's answers up to rounding.
eager: the operations as they were exported: the plain backbone's answers bit for bit.
bfloat16: as folded, in bfloat16.
openvino: compiled by OpenVINO for this processor, fp32.
openvino-int8: the same with weights and activations of convolutions and matrix products in 8 bits."""
