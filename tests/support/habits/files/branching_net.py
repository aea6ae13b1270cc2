"""A model whose operations depend on the values of the batch."""

from rows_net import RowsNet
from torch import Tensor


class BranchingNet(RowsNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 5:
            x = x / 2
        return super().forward(x)
