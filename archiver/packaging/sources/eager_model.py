"""A user's eager model that comes without an archive: made by a factory, with its weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from early_exit.handler.errors import ArchiveError


def model_from_factory(reference: str, weights: Path) -> nn.Module:
    """Call 'package.module:function' and load its weights.

    Raises:
        ArchiveError: the function cannot be imported or does not return a module, or the weights do not fit.
    """
    module_name, _, function_name = reference.partition(":")
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
    except Exception as error:  # unpickling may raise anything
        raise ArchiveError(f"{path.name} is damaged, or holds more than tensors, and unpickling that could run any "
                           f"code: save model.state_dict() instead ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ArchiveError(f"{path.name} holds a {type(state).__name__}, expected a state dict")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArchiveError(f"the weights in {path.name} do not fit {type(model).__name__}: {error}") from error
