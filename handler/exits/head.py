"""A small classifier on an intermediate activation, built from a specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from typing import Any

from torch import Tensor, nn

from early_exit.handler.backbone.pooling import Side, pool_activation, pooled_shape
from early_exit.handler.errors import PlanError


@dataclass(frozen=True)
class Convolution:
    """A convolution with ReLU; its padding keeps the side at stride 1."""

    kernel: int
    stride: int
    channels: int
    separable: bool = False
    """Whether it is a depthwise convolution and then a pointwise one, at a fraction of the cost."""

    def __post_init__(self) -> None:
        if self.kernel not in (1, 3, 5, 7) or self.stride < 1 or self.channels < 1:
            raise PlanError(f"a convolution needs a kernel of 1, 3, 5 or 7, and a stride and channels of at least 1, "
                            f"got {self}")

    def layers(self, channels: int) -> list[nn.Module]:
        """Return the layers for an input with this number of channels."""
        padding = self.kernel // 2
        if not self.separable:
            return [nn.Conv2d(channels, self.channels, self.kernel, self.stride, padding), nn.ReLU()]
        return [nn.Conv2d(channels, channels, self.kernel, self.stride, padding, groups=channels, bias=False),
                nn.Conv2d(channels, self.channels, 1), nn.ReLU()]

    def side(self, side: int) -> int:
        """Return the side of the output for the side of an input."""
        return (side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class HeadSpec:
    """The architecture of a head: pool, convolutions, linear layers, classifier."""

    pool: Side = 4
    """Side to which feature maps are average-pooled; with None, the head reads whole activations."""
    convolutions: tuple[Convolution, ...] = ()
    """Convolutions before the linear layers; they need feature maps."""
    widths: tuple[int, ...] = (64,)
    """Output widths of the linear layers before the classifier; empty for a linear classifier."""
    recorded: Side = None
    """Side to which the training records had been pooled, or None if they had not been pooled."""

    def __post_init__(self) -> None:
        sides = [side for side in (self.pool, self.recorded) if side is not None]
        if any(size < 1 for size in (*sides, *self.widths)):
            raise PlanError(f"a head's pool and widths must be at least 1, got {self}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadSpec:
        """Read the output of `to_json`.

        Raises:
            PlanError: the data does not describe a head.
        """
        try:
            return cls(pool=_side(data["pool"]), recorded=_side(data.get("recorded")),
                       convolutions=tuple(Convolution(**convolution) for convolution in data["convolutions"]),
                       widths=tuple(int(width) for width in data["widths"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"expected a head with 'pool', 'convolutions' and 'widths', found {data!r}") from error

    def reads(self, recorded: Tensor) -> Tensor:
        """Return the input of the head for (B, ...) recorded activations."""
        # Tokens that were summarised once must not be summarised again.
        return recorded if self.pool == self.recorded else pool_activation(recorded, self.pool)

    def in_words(self) -> str:
        parts = ["raw" if self.pool is None else f"pool {self.pool}"]
        parts += [f"{'separable ' if layer.separable else ''}conv {layer.kernel}x{layer.kernel}/{layer.stride} "
                  f"{layer.channels}" for layer in self.convolutions]
        return ", ".join([*parts, *(f"linear {width}" for width in self.widths)])


class Head(nn.Module):
    """Maps an activation to class logits."""

    def __init__(self, spec: HeadSpec, shape: tuple[int, ...], n_classes: int) -> None:
        """Build an untrained head.

        Args:
            spec: the architecture.
            shape: one row of the activation: (C, H, W), (T, D) or (D,).
            n_classes: K.

        Raises:
            PlanError: the architecture has convolutions, but the activation is not a feature map.
        """
        super().__init__()
        self.spec = spec
        recorded = pooled_shape(shape, spec.recorded)
        # If the windows divide evenly, pooling twice gives the same as pooling once.
        self._first = None if spec.recorded == spec.pool or _nests(shape, spec) else spec.recorded
        shape = pooled_shape(recorded, spec.pool)
        if spec.convolutions and len(shape) != 3:
            raise PlanError(f"a head with convolutions needs feature maps, but this activation has the shape {shape}")
        layers: list[nn.Module] = []
        for convolution in spec.convolutions:
            layers += convolution.layers(shape[0])
            shape = (convolution.channels, convolution.side(shape[1]), convolution.side(shape[2]))
        self.flattened = shape
        """Shape of one row of the first linear layer's input, before it is flattened."""
        sizes = [prod(shape), *spec.widths]
        layers.append(nn.Flatten())
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))

    def forward(self, activation: Tensor) -> Tensor:
        """Return (B, K) logits for a (B, ...) activation as the backbone computes it."""
        return self.classify(self.pool(activation))

    def pool(self, activation: Tensor) -> Tensor:
        """Return the input of the head for a (B, ...) activation as the backbone computes it."""
        if self._first is not None:
            return self.spec.reads(pool_activation(activation, self._first))
        return pool_activation(activation, self.spec.pool)

    def classify(self, pooled: Tensor) -> Tensor:
        """Return (B, K) logits for the input of the head: a (B, ...) activation pooled to the side of its spec."""
        logits: Tensor = self.layers(pooled)
        return logits


def _nests(shape: tuple[int, ...], spec: HeadSpec) -> bool:
    """Tell whether pooling to the head's side gives the same result with and without pooling to the recorded side."""
    if len(shape) != 3 or spec.recorded is None or spec.pool is None:
        return False
    return all(size <= spec.recorded or (size % spec.recorded == 0 and spec.recorded % spec.pool == 0)
               for size in shape[1:])


def _side(value: Any) -> Side:
    return None if value is None else int(value)
