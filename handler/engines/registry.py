"""The engines, which execute the stages of a backbone.

An engine cuts a backbone into stages and compiles each stage to a module that maps the tensors entering the stage to
the tensors leaving it. It is chosen once for an archive, and rewrites the weights when they are loaded.
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
from early_exit.handler.engines.compiled_stage import CompiledStage, Read
from early_exit.handler.engines.fold import fold
from early_exit.handler.engines.fuse import fuse
from early_exit.handler.engines.openvino import compile_float, compile_int8, int8_digest
from early_exit.handler.engines.rewriting import needs_casts, reads_order
from early_exit.handler.errors import ConfigError, PlanError

Arrange = Callable[[Tensor], tuple[Tensor, Read]]


def as_given(x: Tensor) -> tuple[Tensor, Read]:
    """Pass an activation on as the backbone computes it; an `Arrange`."""
    return x, Tensor.float


@dataclass(frozen=True)
class Engine:
    """One way to execute stages. Other code uses these properties, never the name, to tell engines apart."""

    name: str
    compile: Callable[[Backbone, Sequence[str]], list[CompiledStage]]
    """Takes a backbone and the names of the values at the cuts, as `split` does."""
    is_exact: bool
    """Whether its answers are the backbone's up to rounding (1e-4). If not, a certificate includes its changes."""
    max_probe_error: float
    """The largest accepted difference from the scores stored in an archive, relative to the largest score. Other
    processors stay below it, and a damaged weight lies far above it."""
    arrange: Arrange = as_given
    """Takes a (B, ...) float activation and returns it in the form in which it passes between these stages, with the
    `Read` for that form."""
    on_gpu: bool = True
    """Whether it also runs on a GPU."""
    runs_detectors: bool = False
    """Whether it executes the stages of detectors, which pass several activations on to the end."""
    needs_calibration: bool = False
    """Whether its weights are made from recorded requests when an archive is built."""
    digest: Callable[[Path], str] | None = None
    """Takes the folder of an archive and returns a hash of the files that this engine has in it besides the backbone.
    None if the engine has no such files."""

    def unsplit(self, backbone: Backbone) -> nn.Module:
        """Return the whole backbone as this engine executes it, for comparison with exits."""
        [whole] = self.compile(backbone, [])
        return whole.module

    def identity(self, folder: Path | None) -> str:
        """Return the identity in records, plans and certificates: the name, and a hash of the engine's own files if it
        has any."""
        return self.name if self.digest is None or folder is None else f"{self.name}@{self.digest(folder)}"


def engine_of(identity: str) -> Engine:
    """Return the engine with this name or identity.

    Raises:
        ConfigError: this version has no engine of that name.
    """
    name = identity.partition("@")[0]
    if name not in ENGINES:
        raise ConfigError(f"expected one of the engines {', '.join(ENGINES)}, found {identity!r}: does it come from a "
                          "newer version of early-exit-torchserve?")
    return ENGINES[name]


def are_alike(first: str, second: str) -> bool:
    """Tell whether records of one engine are also valid for the other; both arguments are identities."""
    return first == second or (engine_of(first).is_exact and engine_of(second).is_exact)


def require_engine(planned: str, identity: str) -> None:
    """Check that a plan which was made on one engine may serve on another; both arguments are identities.

    Raises:
        PlanError: the plan's heads and its certificate belong to another engine.
    """
    if not are_alike(planned, identity):
        raise PlanError(f"the plan was made on the engine {planned}, and its certificate includes the answers that "
                        f"this engine changes, but the archive is executed by {identity}: train on records of this "
                        "archive")


def _as_exported(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    return [CompiledStage(stage) for stage in split(backbone.graph, boundaries)]


def _folded(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    return [CompiledStage(stage) for stage in _rewritten(backbone, boundaries)]


def _in_bfloat16(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    if needs_casts(backbone.graph.graph):
        raise ConfigError("the engine bfloat16 computes in one dtype, in which a cast returns no copy, but this model "
                          "writes in place into a tensor that it has cast and reads the other one afterwards: choose "
                          "another engine, such as ee-archive --engine folded")
    return in_bfloat16(_rewritten(backbone, boundaries))


def _rewritten(backbone: Backbone, boundaries: Sequence[str]) -> list[fx.GraphModule]:
    channels_last = not reads_order(backbone.graph.graph)  # of the whole backbone, because maps pass between stages
    stages = [fold(stage, channels_last=channels_last) for stage in split(backbone.graph, boundaries)]
    is_nvidia = backbone.device.type == "cuda" and torch.version.cuda is not None
    return [fuse(stage) for stage in stages] if is_nvidia else stages


def _channels_last(x: Tensor) -> tuple[Tensor, Read]:
    return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x), Tensor.float


def _channels_last_bfloat16(x: Tensor) -> tuple[Tensor, Read]:
    return _channels_last(x)[0].bfloat16(), Tensor.float


def _integers(x: Tensor) -> tuple[Tensor, Read]:
    return (x * 255).byte(), Tensor.float


DEFAULT_ENGINE = "folded"
INT8 = "openvino-int8"
ENGINES = {engine.name: engine for engine in (
    Engine(DEFAULT_ENGINE, _folded, is_exact=True, max_probe_error=1e-3, arrange=_channels_last, runs_detectors=True),
    Engine("eager", _as_exported, is_exact=True, max_probe_error=1e-3, runs_detectors=True),
    Engine("bfloat16", _in_bfloat16, is_exact=False, max_probe_error=0.2, arrange=_channels_last_bfloat16),
    Engine("openvino", compile_float, is_exact=True, max_probe_error=1e-3, on_gpu=False),
    Engine(INT8, compile_int8, is_exact=False, max_probe_error=0.5, arrange=_integers, on_gpu=False,
           needs_calibration=True, digest=int8_digest),
)}
"""folded: batch norms in the convolutions, channels_last, fp32; it gives the plain backbone's answers up to rounding.
eager: the operations as they were exported; it gives the plain backbone's answers bit for bit.
bfloat16: as folded, in bfloat16.
openvino: compiled by OpenVINO for this processor, fp32.
openvino-int8: as openvino, with weights and activations of convolutions and matrix products in 8 bits."""
