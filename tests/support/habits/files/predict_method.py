from rows_handler import RowsHandler


class PredictMethod(RowsHandler):
    def inference(self, data):
        return self.model.predict(data)

    def postprocess(self, data):
        return data.tolist()
