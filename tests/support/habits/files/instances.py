import torch
from rows_handler import RowsHandler


class Instances(RowsHandler):
    """Gets lists of numbers out of an envelope."""

    def preprocess(self, data):
        return torch.tensor(data, dtype=torch.float32)
