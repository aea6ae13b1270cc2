import queue
import threading

import torch
from rows_handler import RowsHandler


class MicroBatches(RowsHandler):
    """A handler that sends parts of a batch through threads for each step, like TorchServe's micro-batching example."""

    def initialize(self, context):
        super().initialize(context)
        self.steps = [queue.Queue() for _ in range(3)]
        self.done = queue.Queue()
        for work, inbox, outbox in zip((self.preprocess, self.inference, self.postprocess), self.steps,
                                       [*self.steps[1:], self.done]):
            for _ in range(2):
                threading.Thread(target=self.serve, args=(work, inbox, outbox), daemon=True).start()

    def serve(self, work, inbox, outbox):
        while True:
            number, part = inbox.get()
            try:
                outbox.put((number, part if isinstance(part, Exception) else work(part)))
            except Exception as error:
                outbox.put((number, error))

    @torch.no_grad()
    def inference(self, data):
        return self.model(data)

    def handle(self, data, context):
        parts = [data[start:start + 2] for start in range(0, len(data), 2)]
        for number, part in enumerate(parts):
            self.steps[0].put((number, part))
        answers = dict(self.done.get() for _ in parts)
        for answer in answers.values():
            if isinstance(answer, Exception):
                raise answer
        return [one for number in range(len(parts)) for one in answers[number]]
