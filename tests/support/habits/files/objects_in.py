import json

from rows_handler import RowsHandler


class ObjectsIn(RowsHandler):
    """A handler of JSON objects that name their numbers, any of which may be missing."""

    def preprocess(self, data):
        bodies = [item.get("data") or item.get("body") for item in data]
        objects = [body if isinstance(body, dict) else json.loads(body) for body in bodies]
        return super().preprocess([{"body": [each.get(name, 0.0) for name in "abcdef"]} for each in objects])
