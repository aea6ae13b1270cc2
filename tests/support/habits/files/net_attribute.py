from pathlib import Path

import torch
from rows_handler import RowsHandler
from rows_net import RowsNet


class NetAttribute(RowsHandler):
    def initialize(self, context):
        self.net = RowsNet()
        self.net.load_state_dict(torch.load(Path(context.system_properties["model_dir"]) / "weights.pth"))
        self.net.eval()
        self.initialized = True

    def inference(self, data):
        with torch.no_grad():
            return self.net(data)
