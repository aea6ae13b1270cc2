import torch
from rows_handler import RowsHandler


class ModelDevice(RowsHandler):
    def inference(self, data):
        with torch.no_grad():
            return self.model(data.to(self.model.device))
