"""A model that multiplies its scores by one of its attributes."""

from rows_net import RowsNet
from torch import Tensor


class SharpenedNet(RowsNet):
    sharpness = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.sharpness
