import json

import torch
from rows_handler import RowsHandler


class SharpenedPerRequest(RowsHandler):
    """A handler whose requests tell how sharp their answers shall be."""

    def handle(self, data, context):
        answers = []
        for item in data:
            body = item.get("body")
            body = json.loads(body) if isinstance(body, (bytes, bytearray)) else body
            self.model.sharpness = body["sharpness"]
            with torch.inference_mode():
                answers += self.postprocess(self.model(torch.tensor([body["row"]])))
        return answers
