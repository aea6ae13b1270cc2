import threading

from rows_handler import RowsHandler


class KeptContext(RowsHandler):
    """A handler that keeps the context from its initialization and sets attributes on it."""

    def initialize(self, context):
        super().initialize(context)
        self.own = context
        context.lock = threading.Lock()
        context.names = {0: "one", 1: "two", 2: "three"}

    def preprocess(self, data):
        self.own.kinds = [self.own.get_request_header(number, "X-Kind") for number in range(len(data))]
        return super().preprocess(data)

    def postprocess(self, data):
        with self.own.lock:
            for number in range(len(data)):
                self.own.set_response_content_type(number, "application/json")
        return [{"name": self.own.names[answer["class"]], "of": self.own.manifest["model"]["modelName"],
                 "kind": kind, "handler": self.own.manifest["model"]["handler"].rpartition("/")[2]}
                for answer, kind in zip(super().postprocess(data), self.own.kinds)]
