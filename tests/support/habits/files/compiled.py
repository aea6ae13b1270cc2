import torch
from rows_handler import RowsHandler


class Compiled(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        self.model = torch.compile(self.model, backend="eager")
