import torch
from rows_handler import RowsHandler


class NamedInputs(RowsHandler):
    """A handler that gets the tensors of KServe's second protocol."""

    def preprocess(self, data):
        return torch.tensor([item["data"] for item in data], dtype=torch.float32)

    def postprocess(self, data):
        return data.softmax(dim=1).tolist()
