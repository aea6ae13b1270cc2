from rows_handler import RowsHandler


class ArrayOut(RowsHandler):
    def postprocess(self, data):
        return [row.numpy().tobytes() for row in data.softmax(dim=1)]
