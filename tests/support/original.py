"""What users start from: an archive made with torch-model-archiver, or a model class with its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive
from safetensors.torch import save_file
from torch import Tensor, nn

from early_exit.archiver.packaging.request import ArchiveRequest

MODELS = Path(__file__).with_name("models")


def original_mar(folder: Path, name: str, model_file: str, handler: str, weights: Mapping[str, Tensor],
                 config: str, *, archive_format: str = "default") -> Path:
    """Archive an eager model of `tests/support/models` with its weights.

    Args:
        folder: the folder into which everything is written. It is created.
        name: the name of the model.
        model_file: the file name of the model.
        handler: the file name of the handler, or the name of a built-in one.
        weights: the state dict of the model.
        config: the text of model-config.yaml.
        archive_format: the format, as torch-model-archiver takes it.

    Returns:
        The path of the .mar file. Archives of other formats are in the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(weights), folder / "weights.pth")
    (folder / "model-config.yaml").write_text(config)
    # The archiver works in a folder with the model's name, which another process may use for a model of the same name.
    with FileLock(Path(tempfile.gettempdir()) / "torch-model-archiver.lock"):
        generate_model_archive(ModelArchiverConfig(
            model_name=name, version="1.0", model_file=str(MODELS / model_file),
            serialized_file=str(folder / "weights.pth"),
            handler=str(MODELS / handler) if handler.endswith(".py") else handler,
            config_file=str(folder / "model-config.yaml"), export_path=str(folder), force=True, runtime="python",
            archive_format=archive_format))
    return folder / f"{name}.mar"


def factory_request(folder: Path, to: Path, name: str, model: nn.Module, handler: str, config: str, *,
                    extra_files: Sequence[str] = (), **more: Any) -> ArchiveRequest:
    """Return the request to `ee-archive` for a model without an archive, made of its class, its weights and a handler.

    Args:
        folder: the folder into which the weights and the configuration are written. It is created.
        to: the folder for the archive.
        name: the name of the model.
        model: an instance of a class in `tests/support/models`, whose file may also hold other classes.
        handler: the file name of the handler.
        config: the text of model-config.yaml.
        extra_files: the names of files that the handler imports.
        more: more fields of the request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "weights.safetensors")
    (folder / "model-config.yaml").write_text(config)
    return ArchiveRequest(f"{type(model).__module__}:{type(model).__name__}", to, model_name=name,
                          weights=folder / "weights.safetensors", handler=str(MODELS / handler),
                          extra_files=[MODELS / file for file in extra_files],
                          config=folder / "model-config.yaml", **more)
