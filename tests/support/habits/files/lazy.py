from pathlib import Path

import torch
from rows_handler import RowsHandler
from rows_net import RowsNet


class Lazy(RowsHandler):
    """A handler that loads its model when the first request comes."""

    def initialize(self, context):
        self.manifest, self.device = context.manifest, torch.device("cpu")
        self.folder = Path(context.system_properties["model_dir"])

    def handle(self, data, context):
        if not self.initialized:
            self.model = RowsNet()
            self.model.load_state_dict(torch.load(self.folder / "weights.pth"))
            self.model.eval()
            self.initialized = True
        return super().handle(data, context)
