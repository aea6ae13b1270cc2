from pathlib import Path

from rows_handler import RowsHandler


class LatinLabels(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        folder = Path(context.system_properties["model_dir"])
        self.names = (folder / "labels.txt").read_text(encoding="latin-1").splitlines()

    def postprocess(self, data):
        return [self.names[number] for number in data.argmax(dim=1).tolist()]
