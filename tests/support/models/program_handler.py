"""A handler of digits that loads an exported program, which TorchServe's base handler does not."""

from pathlib import Path

import torch
from digits_handler import DigitsClassifier
from ts.torch_handler.image_classifier import ImageClassifier


class ProgramClassifier(ImageClassifier):
    """A handler that answers with the three likeliest digits for a 32x32 image."""

    topk = 3
    image_processing = DigitsClassifier.image_processing

    def initialize(self, context):
        folder = Path(context.system_properties["model_dir"])
        self.model = torch.export.load(folder / context.manifest["model"]["serializedFile"]).module()
        self.device, self.mapping, self.context, self.initialized = torch.device("cpu"), None, context, True
