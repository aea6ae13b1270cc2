"""A model whose scores are not finite for inputs whose values are all equal."""

from __future__ import annotations

from torch import Tensor, nn


class Spread(nn.Module):
    """A layer that divides by the spread of its input, which is 0 for a black image."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.inner(x)


def spread_model() -> nn.Module:
    return nn.Sequential(Spread(), *(Residual() for _ in range(6)), nn.Linear(16, 4))
