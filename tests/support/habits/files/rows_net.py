"""A classifier of rows of six numbers."""

from torch import Tensor, nn


class RowsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 32), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(32, 24), nn.ReLU())
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))
