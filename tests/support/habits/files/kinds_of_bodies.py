import json

import torch
from rows_handler import RowsHandler


class KindsOfBodies(RowsHandler):
    """A handler that takes bytes, texts, lists and objects, and tells the type of each body."""

    def preprocess(self, data):
        bodies = [item.get("data") or item.get("body") for item in data]
        self.kinds = [type(body).__name__ for body in bodies]
        bodies = [json.loads(body) if isinstance(body, (bytes, bytearray, str)) else body for body in bodies]
        return torch.tensor([body["row"] if isinstance(body, dict) else body for body in bodies])

    def postprocess(self, data):
        return [{**answer, "kind": kind} for answer, kind in zip(super().postprocess(data), self.kinds)]
