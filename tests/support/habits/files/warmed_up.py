import torch
from rows_handler import RowsHandler


class WarmedUp(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        with torch.inference_mode():
            for size in (1, 4):
                self.model(torch.zeros(size, 6, device=self.device))
