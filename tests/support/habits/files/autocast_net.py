"""A model whose first layer computes in bfloat16, by autocast inside forward."""

import torch
from rows_net import RowsNet
from torch import Tensor


class AutocastNet(RowsNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            x = self.first(x)
        return self.last(self.second(x.float()))
