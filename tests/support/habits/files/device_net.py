"""A model with an attribute that tells its device."""

import torch
from rows_net import RowsNet


class DeviceNet(RowsNet):
    @property
    def device(self) -> torch.device:
        return self.last.weight.device
