import torch
from rows_handler import RowsHandler


class Instances(RowsHandler):
    """A handler that gets lists of numbers from an envelope."""

    def preprocess(self, data):
        return torch.tensor(data, dtype=torch.float32)
