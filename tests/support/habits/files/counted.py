from rows_handler import RowsHandler
from ts.metrics.metric_type_enum import MetricTypes


class Counted(RowsHandler):
    """A handler that reports its own metrics, like TorchServe's example of custom metrics."""

    def initialize(self, context):
        super().initialize(context)
        self.requests = context.metrics.add_metric_to_cache(
            metric_name="RowsSeen", unit="count", dimension_names=["ModelName"], metric_type=MetricTypes.COUNTER)

    def postprocess(self, data):
        self.requests.add_or_update(len(data), [self.context.model_name])
        self.context.metrics.add_size("AnswerSize", 8 * data.numel(), unit="B")
        return super().postprocess(data)
