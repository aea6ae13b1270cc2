import random
import time
import uuid

from rows_handler import RowsHandler


class Noisy(RowsHandler):
    def postprocess(self, data):
        return [{"id": str(uuid.uuid4()), "time": time.time(), "noise": random.random(), **answer}
                for answer in super().postprocess(data)]
