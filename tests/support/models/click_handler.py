"""A handler that answers click records, in JSON or binary, with the probability of a click."""

import torch
from criteo import decode
from ts.torch_handler.base_handler import BaseHandler


class ClickHandler(BaseHandler):
    """A handler that gives one answer for a record, and a list of answers for a list or a binary batch."""

    def preprocess(self, data):
        bodies = [item.get("data", item.get("body")) for item in data]
        records = [decode(body) for body in bodies]
        self._sizes = [len(one) for one in records]
        self._alone = [isinstance(body, dict) or bytes(body[:1]) == b"{" for body in bodies]
        return torch.tensor([record for one in records for record in one], device=self.device)

    def postprocess(self, scores):
        clicks = iter(scores.softmax(dim=1)[:, 1].tolist())
        answers = [[{"click": next(clicks)} for _ in range(size)] for size in self._sizes]
        return [answer[0] if alone else answer for answer, alone in zip(answers, self._alone)]
