import torch
from rows_handler import RowsHandler


class DistinctRows(RowsHandler):
    """Asks the model once for requests that are equal."""

    def inference(self, data):
        rows, number = torch.unique(data, dim=0, return_inverse=True)
        return super().inference(rows)[number]
