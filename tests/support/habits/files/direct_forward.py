import torch
from rows_handler import RowsHandler


class DirectForward(RowsHandler):
    def inference(self, data):
        with torch.no_grad():
            return self.model.forward(data)
