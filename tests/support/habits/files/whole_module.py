from pathlib import Path

import torch
from rows_handler import RowsHandler


class WholeModule(RowsHandler):
    def initialize(self, context):
        self.manifest, self.device = context.manifest, torch.device("cpu")
        folder = Path(context.system_properties["model_dir"])
        self.model = torch.load(folder / self.manifest["model"]["serializedFile"], weights_only=False).eval()
        self.initialized = True
