import json
from pathlib import Path

from rows_handler import RowsHandler
from scaling import Scale
from torch import nn


class ScaledInFront(RowsHandler):
    def initialize(self, context):
        super().initialize(context)
        statistics = json.loads((Path(context.system_properties["model_dir"]) / "statistics.json").read_text())
        self.model = nn.Sequential(Scale(statistics["mean"], statistics["deviation"]), self.model).eval()
