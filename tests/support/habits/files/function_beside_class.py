from rows_handler import RowsHandler


class Wrapped(RowsHandler):
    """A class from before the function was written. TorchServe prefers the function."""

    def postprocess(self, data):
        return ["the class answers"] * len(data)

    def answers(self, data):
        return [{"likeliest": row.argmax().item(), "of": row.softmax(dim=0).tolist()} for row in data]


_handler = Wrapped()


def handle(data, context):
    if not _handler.initialized:
        _handler.initialize(context)
    if data is None:
        return None
    return _handler.answers(_handler.inference(_handler.preprocess(data)))
