from pathlib import Path

import torch
from rows_handler import RowsHandler


class AveragedWeights(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        folder = Path(context.system_properties["model_dir"])
        self.model.load_state_dict(torch.load(folder / "ema.pth", map_location=self.device))
        self.model.eval()
