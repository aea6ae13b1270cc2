"""A user's eager model: made by a model file as TorchServe makes it, or by a factory, with its weights."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from early_exit.handler.errors import ArchiveError
from early_exit.handler.python_modules import own_classes
from early_exit.training.data.preprocessing import importing_from


def eager_model(folder: Path, manifest: dict[str, Any]) -> nn.Module:
    """Build the model of an extracted archive the way TorchServe does: model file + state dict.

    Raises:
        ArchiveError: there is no eager model in it, or its weights are not plain tensors.
    """
    model = manifest["model"]
    if not model.get("modelFile"):
        serialized = folder / str(model.get("serializedFile"))
        kind = "a TorchScript archive" if _is_torchscript(serialized) else "no model file (.py)"
        raise ArchiveError(
            f"{model['modelName']} holds {kind}, and torch.export needs the eager model: archive it with --model-file "
            "and its state dict, or give 'package.module:function' with --weights, or an exported .pt2")
    with importing_from(folder):
        try:
            classes = own_classes(importlib.import_module(Path(model["modelFile"]).stem))
            if len(classes) != 1:
                raise ArchiveError(f"expected exactly one class in {model['modelFile']}, as TorchServe does, found "
                                   f"{[kind.__name__ for kind in classes]}")
            instance: nn.Module = classes[0]()
        except ArchiveError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise ArchiveError(f"cannot make the model of {model['modelFile']} without arguments, as TorchServe does: "
                               f"{type(error).__name__}: {error}") from error
    if model.get("serializedFile"):
        load_weights(instance, folder / model["serializedFile"])
    return instance.eval()


def model_from_factory(reference: str, weights: Path) -> nn.Module:
    """Call 'package.module:function' and load its weights.

    Raises:
        ArchiveError: the function cannot be imported or does not return a module, or the weights do not fit.
    """
    module_name, _, function_name = reference.partition(":")
    with importing_from(Path.cwd(), forget=False):
        try:
            factory: Callable[[], object] = getattr(importlib.import_module(module_name), function_name)
            model = factory()
        except Exception as error:  # the user's own code may raise anything
            raise ArchiveError(f"cannot make a model with {reference!r}: {type(error).__name__}: {error}. Expected "
                               "package.module:function, importable from here") from error
    if not isinstance(model, nn.Module):
        raise ArchiveError(f"{reference} returned {type(model).__name__}, expected a torch.nn.Module")
    load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from .safetensors or a pickle that holds only tensors.

    Raises:
        ArchiveError: the file holds anything else, or does not fit the model.
    """
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ArchiveError(f"cannot read the weights {path}: {error}") from error
    except Exception as error:  # what unpickling raises depends on what it met
        raise ArchiveError(f"{path.name} is damaged, or holds more than tensors, and unpickling that could run any "
                           f"code: save model.state_dict() instead ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ArchiveError(f"{path.name} holds a {type(state).__name__}, expected a state dict")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArchiveError(f"the weights in {path.name} do not fit {type(model).__name__}: {error}") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
