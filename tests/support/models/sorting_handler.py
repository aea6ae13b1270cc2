"""A handler that sorts its batch by the first number of each request. Requests are JSON lists of numbers."""

import json

import torch
from ts.torch_handler.base_handler import BaseHandler


class SortingHandler(BaseHandler):
    """A handler that still gives each request the answer to its own row."""

    def preprocess(self, data):
        rows = [json.loads(item["body"]) for item in data]
        self._order = sorted(range(len(rows)), key=lambda item: rows[item][0])
        return torch.tensor([rows[item] for item in self._order])

    def postprocess(self, scores):
        classes = dict(zip(self._order, scores.argmax(dim=1).tolist()))
        return [{"class": classes[item]} for item in range(len(self._order))]
