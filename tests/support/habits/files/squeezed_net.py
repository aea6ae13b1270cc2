"""A model that squeezes away a sequence dimension of size 1, and with it the batch dimension of a batch of one."""

from rows_net import RowsNet
from torch import Tensor


class SqueezedNet(RowsNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1).squeeze())
