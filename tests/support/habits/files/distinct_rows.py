import torch
from rows_handler import RowsHandler


class DistinctRows(RowsHandler):
    """A handler that asks the model only once about equal requests."""

    def inference(self, data):
        rows, number = torch.unique(data, dim=0, return_inverse=True)
        return super().inference(rows)[number]
