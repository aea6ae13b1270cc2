"""The service object of a module-level handler."""

import json
from pathlib import Path

import torch
from rows_net import RowsNet


class RowsService:
    def __init__(self):
        self.initialized = False
        self.net = None

    def initialize(self, context):
        folder = Path(context.system_properties["model_dir"])
        self.net = RowsNet()
        self.net.load_state_dict(torch.load(folder / context.manifest["model"]["serializedFile"]))
        self.net.eval()
        self.initialized = True

    def preprocess(self, data):
        rows = []
        for item in data:
            body = item.get("data") or item.get("body")
            rows.append(json.loads(body) if isinstance(body, (bytes, bytearray)) else body)
        return torch.tensor(rows, dtype=torch.float32)

    @torch.no_grad()
    def handle(self, data):
        probabilities = self.net(self.preprocess(data)).softmax(dim=1)
        return [{"class": row.argmax().item(), "probabilities": row.tolist()} for row in probabilities]
