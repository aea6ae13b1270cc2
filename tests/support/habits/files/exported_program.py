from pathlib import Path

import torch
from rows_handler import RowsHandler


class ExportedProgramHandler(RowsHandler):
    def initialize(self, context):
        self.manifest, self.device = context.manifest, torch.device("cpu")
        folder = Path(context.system_properties["model_dir"])
        self.model = torch.export.load(folder / self.manifest["model"]["serializedFile"]).module()
        self.initialized = True
