from rows_handler import RowsHandler
from ts.utils.util import PredictionException


class OwnException(RowsHandler):
    """A handler that refuses rows with TorchServe's exception."""

    def preprocess(self, data):
        rows = super().preprocess(data)
        if (rows.sum(dim=1) > 1000).any():
            raise PredictionException("the row is too large", 422)
        return rows
