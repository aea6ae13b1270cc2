from rows_handler import RowsHandler


class Squeezed(RowsHandler):
    def postprocess(self, data):
        return super().postprocess(data.reshape(-1, 3))
