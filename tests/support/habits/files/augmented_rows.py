from rows_handler import RowsHandler


class AugmentedRows(RowsHandler):
    """Three rows of each request, whose scores are averaged."""

    def preprocess(self, data):
        rows = super().preprocess(data)
        return (rows[:, None] * rows.new_tensor([0.9, 1.0, 1.1])[:, None]).flatten(0, 1)

    def postprocess(self, data):
        return super().postprocess(data.unflatten(0, (-1, 3)).mean(dim=1))
