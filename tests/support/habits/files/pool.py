from concurrent.futures import ThreadPoolExecutor

import torch
from rows_handler import RowsHandler


class Pool(RowsHandler):
    """A handler that calls the model for each request in a thread of a pool."""

    def initialize(self, context):
        super().initialize(context)
        self.pool = ThreadPoolExecutor(3)

    def inference(self, data):
        return torch.cat(list(self.pool.map(super().inference, data.split(1))))
