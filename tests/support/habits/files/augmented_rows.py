from rows_handler import RowsHandler


class AugmentedRows(RowsHandler):
    """A handler that makes three rows from each request and averages their scores."""

    def preprocess(self, data):
        rows = super().preprocess(data)
        return (rows[:, None] * rows.new_tensor([0.9, 1.0, 1.1])[:, None]).flatten(0, 1)

    def postprocess(self, data):
        return super().postprocess(data.unflatten(0, (-1, 3)).mean(dim=1))
