import json
from pathlib import Path

from rows_handler import RowsHandler


class MarkedLabels(RowsHandler):
    """A handler whose label file was saved by an editor that begins files with a byte order mark."""

    def initialize(self, context):
        super().initialize(context)
        folder = Path(context.system_properties["model_dir"])
        self.mapping = json.loads((folder / "labels.json").read_text(encoding="utf-8-sig"))

    def postprocess(self, data):
        return [{self.mapping[str(number)]: value for number, value in enumerate(row)}
                for row in data.softmax(dim=1).tolist()]
