"""A user's archive as it was before early exits: made with torch-model-archiver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive
from torch import Tensor

MODELS = Path(__file__).with_name("models")


def original_mar(folder: Path, name: str, model_file: str, handler: str, weights: Mapping[str, Tensor],
                 config: str) -> Path:
    """Archive an eager model of `tests/support/models` with its weights.

    Args:
        folder: where everything is written; created.
        name: model name.
        model_file: file name of the model.
        handler: file name of the handler, or the name of a built-in one.
        weights: its state dict.
        config: text of model-config.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(weights), folder / "weights.pth")
    (folder / "model-config.yaml").write_text(config)
    generate_model_archive(ModelArchiverConfig(
        model_name=name, version="1.0", model_file=str(MODELS / model_file),
        serialized_file=str(folder / "weights.pth"),
        handler=str(MODELS / handler) if handler.endswith(".py") else handler,
        config_file=str(folder / "model-config.yaml"), export_path=str(folder), force=True, runtime="python"))
    return folder / f"{name}.mar"
