from pathlib import Path

import torch
from rows_handler import RowsHandler
from rows_net import RowsNet


class Unprefixed(RowsHandler):
    """A handler for weights that were saved from a model inside DataParallel."""

    def initialize(self, context):
        self.context, self.manifest = context, context.manifest
        self.device = torch.device("cpu")
        folder = Path(context.system_properties["model_dir"])
        weights = torch.load(folder / self.manifest["model"]["serializedFile"], map_location=self.device)
        self.model = RowsNet()
        self.model.load_state_dict({name.replace("module.", "", 1): tensor for name, tensor in weights.items()})
        self.model.eval()
        self.initialized = True
