"""Small classifiers of 3 x 8 x 8 images in 5 classes. The forward of each has a habit that an export must preserve."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.zoo import Specimen, image


class Plain(nn.Module):
    """Three convolutions, a mean and a linear layer. The classes below change this model."""

    def __init__(self, convolution: Callable[..., nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.body = nn.Sequential(*(layer for number in range(3) for layer in (
            convolution(3 if number == 0 else 8, 8, 3, padding=1), nn.ReLU())), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(8, 5)
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):  # makes scores depend on the input, as after training
                nn.init.kaiming_normal_(part.weight)
                nn.init.zeros_(part.bias)
        self.register_buffer("masked", torch.tensor([False, False, True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.body(x).flatten(1))
        return scores


class Autocast(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


class HalfPrecisionScores(Plain):
    """A model that returns bfloat16 scores, like many models under autocast."""

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class NestedBlocks(Plain):
    """A model that keeps its classifier out of autocast and switches gradients inside autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            features = self.body(x)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                scores: Tensor = self.fc(features.float().flatten(1))
        return scores


class ProductsUnderAutocast(Plain):
    """A model with an einsum, whose inputs autocast casts down, and a concatenation, which takes the widest dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = self.body(x).flatten(1)
            mixed = torch.einsum("bc,cd->bd", features, self.mix)
            both = torch.cat([mixed, x.mean(dim=(2, 3))], dim=1)
            return self.fc(both[:, :8]).float()


class InferenceMode(Plain):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GradientsSwitched(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            features = self.body(x)
        with torch.set_grad_enabled(False):
            scores: Tensor = self.fc(features.flatten(1))
        return scores


class StandardizedConvolution(nn.Conv2d):
    """A convolution whose weights a batch norm standardizes to zero mean and unit variance."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        return functional.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Standardized(Plain):
    def __init__(self) -> None:
        super().__init__(StandardizedConvolution)


class Distances(Plain):
    """A model that scores a class by how near the prototype of the class is."""

    n_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(self.n_classes, 5))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(super().forward(x), self.prototypes)


class ManyDistances(Distances):
    """A model with so many prototypes that torch computes the distances by a matrix product."""

    n_classes = 40


class Squeezed(Plain):
    """A model that removes every dimension of size 1, including the batch dimension of a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.body(x).squeeze())
        return scores


class MaskedByInfinity(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(self.masked, -torch.inf)


class MaskedByConstant(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(self.masked, -1e9)


class MaskedBySum(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1e4 * self.masked.float()


class SureProbabilities(Plain):
    """A model whose probabilities hardly change, because nearly all of the probability goes to one class."""

    def forward(self, x: Tensor) -> Tensor:
        return (40 * super().forward(x)).softmax(dim=1)


class Logarithm(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.log())


class Root(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sqrt())


class OfPositive(Specimen):
    """A specimen whose inputs are positive numbers."""

    def batch(self, size: int) -> dict[str, Tensor]:
        return {name: values.abs() + 0.1 for name, values in super().batch(size).items()}


def forwards() -> Iterator[Specimen]:
    """Yield one specimen of each habit."""
    for model in (Autocast, HalfPrecisionScores, NestedBlocks, ProductsUnderAutocast, InferenceMode, GradientsSwitched,
                  Standardized, Distances, ManyDistances, Squeezed, MaskedByInfinity, MaskedByConstant, MaskedBySum,
                  SureProbabilities, Logarithm, Root):
        yield (OfPositive if model in (Logarithm, Root) else Specimen)(model.__name__, model, image(8))
