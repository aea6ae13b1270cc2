from rows_handler import RowsHandler
from torch import nn


class DataParallelRows(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        self.model = nn.DataParallel(self.model)
