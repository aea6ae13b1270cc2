import torch
from rows_handler import RowsHandler


class SeveralParts(RowsHandler):
    """A handler that takes a row and a factor as the parts of a form."""

    def preprocess(self, data):
        return torch.tensor([[float(item["factor"].decode()) * value for value in item["row"]]
                             for item in data])
