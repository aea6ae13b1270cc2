"""A handler of JSON lists of numbers, which answers with the likeliest class and all probabilities."""

import json

import torch
from ts.torch_handler.base_handler import BaseHandler


class RowsHandler(BaseHandler):
    def preprocess(self, data):
        bodies = [item.get("data") or item.get("body") for item in data]
        rows = [json.loads(body) if isinstance(body, (bytes, bytearray, str)) else body for body in bodies]
        return torch.tensor(rows, dtype=torch.float32)

    def postprocess(self, data):
        return [{"class": row.argmax().item(), "probabilities": row.tolist()} for row in data.softmax(dim=1)]
