"""Rows are counts and amounts: the model takes logarithms of some and roots of the others."""

import torch
from rows_net import RowsNet
from torch import Tensor


class LogarithmNet(RowsNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([torch.log(x[:, :3]), torch.sqrt(x[:, 3:])], dim=1))
