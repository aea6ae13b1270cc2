import torch
from rows_handler import RowsHandler
from rows_net import RowsNet


class CompiledCheckpoint(RowsHandler):
    """A handler for weights that were saved from a compiled model."""

    def _load_pickled_model(self, model_dir, model_file, model_pt_path):
        weights = torch.load(model_pt_path, map_location=self.device)
        model = RowsNet()
        model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()})
        return model
