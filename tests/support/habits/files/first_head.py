from rows_handler import RowsHandler


class FirstHead(RowsHandler):
    def postprocess(self, data):
        return super().postprocess(data["colour"])
