from rows_handler import RowsHandler


class Strict(RowsHandler):
    """A handler that raises an error for an invalid request, which fails the whole batch."""

    def preprocess(self, data):
        rows = super().preprocess(data)
        if rows.shape[1] != 6:
            raise ValueError(f"expected rows of 6 numbers, found {rows.shape[1]}")
        return rows
