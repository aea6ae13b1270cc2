from pathlib import Path

import torch
from rows_handler import RowsHandler
from rows_net import RowsNet


class ModelsByName(RowsHandler):
    def initialize(self, context):
        self.models = {}
        net = RowsNet()
        net.load_state_dict(torch.load(Path(context.system_properties["model_dir"]) / "weights.pth"))
        self.models["rows"] = net.eval()
        self.initialized = True

    def inference(self, data):
        with torch.no_grad():
            return self.models["rows"](data)
