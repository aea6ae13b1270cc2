from rows_handler import RowsHandler


class OneByOne(RowsHandler):
    def handle(self, data, context):
        answers = []
        for item in data:
            answers += self.postprocess(self.inference(self.preprocess([item])))
        return answers
