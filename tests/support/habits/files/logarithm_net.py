"""A model of rows of counts and amounts, which takes the logarithms of some and the roots of the others."""

import torch
from rows_net import RowsNet
from torch import Tensor


class LogarithmNet(RowsNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([torch.log(x[:, :3]), torch.sqrt(x[:, 3:])], dim=1))
