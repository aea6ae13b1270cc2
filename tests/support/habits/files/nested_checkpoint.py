from pathlib import Path

import torch
from rows_handler import RowsHandler
from rows_net import RowsNet


class NestedCheckpoint(RowsHandler):
    """A handler for a training checkpoint that holds more than the weights."""

    def initialize(self, context):
        self.manifest = context.manifest
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = Path(context.system_properties["model_dir"])
        checkpoint = torch.load(folder / self.manifest["model"]["serializedFile"], map_location=self.device,
                                weights_only=False)
        print(f"loaded epoch {checkpoint['epoch']}, {checkpoint['arguments'].name}")
        self.model = RowsNet().to(self.device)
        self.model.load_state_dict(checkpoint["state_dict"])
        self.model.eval()
        self.initialized = True
