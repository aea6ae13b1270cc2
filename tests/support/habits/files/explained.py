from captum.attr import IntegratedGradients
from rows_handler import RowsHandler


class Explained(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        self.gradients = IntegratedGradients(self.model)

    def get_insights(self, tensor_data, _, target=0):
        return self.gradients.attribute(tensor_data, target=target, n_steps=20).tolist()
