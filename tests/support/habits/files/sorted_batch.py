import torch
from rows_handler import RowsHandler


class SortedBatch(RowsHandler):
    """A handler that sorts rows by size, as others sort texts by length, and puts the answers back in order."""

    def inference(self, data):
        order = data.abs().sum(dim=1).argsort(descending=True)
        scores = super().inference(data[order])
        return scores[torch.argsort(order)]
