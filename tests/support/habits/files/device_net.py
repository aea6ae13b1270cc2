"""A model that tells on which device it is."""

import torch
from rows_net import RowsNet


class DeviceNet(RowsNet):
    @property
    def device(self) -> torch.device:
        return self.last.weight.device
