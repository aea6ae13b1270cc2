from rows_handler import RowsHandler
from torch import nn


class SoftmaxWrapper(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        self.model = nn.Sequential(self.model, nn.Softmax(dim=1))

    def postprocess(self, data):
        return data.tolist()
