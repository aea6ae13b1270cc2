from rows_handler import RowsHandler


class ReversedBatch(RowsHandler):
    def inference(self, data):
        return super().inference(data.flip(0)).flip(0)
