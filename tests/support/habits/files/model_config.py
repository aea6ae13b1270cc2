from rows_handler import RowsHandler


class ModelConfig(RowsHandler):
    def postprocess(self, data):
        names = self.model.config.id2label
        return [{"label": names[row.argmax().item()], "score": row.max().item()} for row in data.softmax(dim=1)]
