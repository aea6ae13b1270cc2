"""Runs the user's handler on recorded requests up to the call of its model, without a server."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.archive_layout import ArchiveLayout, read_manifest
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.backbone.signature import bind
from early_exit.handler.errors import ArchiveError, ConfigError, InputError
from early_exit.handler.inference.forward import Live
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.user_handler.alone import ModelReached
from early_exit.handler.user_handler.context import HandlerContext, ToolContext
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.handler.user_handler.entry_point import UserHandler
from early_exit.handler.user_handler.wrapper import load_user_handler
from early_exit.training.data.skipped import NOT_KEPT, Skipped
from early_exit.training.environment import without_other_variables
from early_exit.training.text_files import read_yaml


class _Messenger(nn.Module):
    def forward(self, *given: object, **named: object) -> Tensor:
        raise ModelReached(given, named)


class Preprocessing:
    """The part of a user's handler that comes before the model."""

    def __init__(self, handler: UserHandler, name: str, context: HandlerContext, folder: Path, *,
                 one_by_one: bool) -> None:
        """Use a handler that is loaded.

        Args:
            handler: the user's handler, whose model raises `ModelReached` when it is called.
            name: the name of the handler, for errors.
            context: the context of the handler.
            folder: the folder of the extracted archive.
            one_by_one: whether each request must be run alone, because the handler's rows cannot be assigned to its
                requests.
        """
        self._handler, self._name, self._context, self._folder = handler, name, context, folder
        self._one_by_one = one_by_one

    def model_inputs(self, requests: Sequence[KeptRequest | None], model: BackboneDescription,
                     skipped: Skipped) -> tuple[list[int], Live]:
        """Return the model inputs that the handler makes from recorded requests.

        Args:
            requests: requests as the handler received them; None for a request that was not kept.
            model: the model that the handler calls.
            skipped: counts the requests that were not kept, and those for which the handler fails or does not call its
                model with one row.

        Returns:
            The positions of the M requests that were not skipped, ascending, and (M, ...) tensors in the order of the
            model's inputs; no tensors if M is 0.
        """
        known = [(position, request) for position, request in enumerate(requests) if request is not None]
        for _ in range(len(requests) - len(known)):
            skipped.count(NOT_KEPT)
        if len(known) > 1 and not self._one_by_one:
            with suppress(ArchiveError, InputError):  # running them one by one below shows which of them fails
                return [position for position, _ in known], self._given([request for _, request in known], model)
        positions, rows = list[int](), list[Live]()
        for position, request in known:
            try:
                rows.append(self._given([request], model))
            except (ArchiveError, InputError) as error:
                skipped.count_error(error)
            else:
                positions.append(position)
        return positions, tuple(torch.cat(parts) for parts in zip(*rows))

    def _given(self, requests: Sequence[KeptRequest], model: BackboneDescription) -> Live:
        """Return the (B, ...) tensors that the handler passes to its model for B requests.

        Raises:
            ArchiveError: the handler fails, or does not make one row from each request.
            InputError: the handler passes something that does not fit the model's inputs.
        """
        # A handler may modify its input, and may receive the same requests again: it gets copies.
        calls = [copy.deepcopy(request).call(f"request-{number}") for number, request in enumerate(requests)]
        self._context.begin(calls)
        try:
            with _working_in(self._folder):
                self._handler.handle([call.inputs for call in calls], self._context)
        except ModelReached as reached:
            batch = bind(model.inputs, reached.given, reached.named, model.constants, model.parameters)
        except Exception as error:  # the user's own code may raise anything
            raise ArchiveError(f"{self._name} fails on a request with {type(error).__name__}: {error}") from error
        else:
            raise ArchiveError(f"{self._name} answers a request without calling self.model")
        if len(batch[0]) != len(requests):
            raise ArchiveError(f"{self._name} makes {len(batch[0])} rows from {len(requests)} requests: expected one "
                               "row for each request")
        return batch


@contextmanager
def preprocessing(folder: Path, manifest: dict[str, Any]) -> Iterator[Preprocessing]:
    """Load the handler of an extracted archive as a TorchServe worker does, around a model that does nothing.

    Args:
        folder: the archive.
        manifest: the manifest that the user's handler expects.

    Raises:
        ArchiveError: the handler cannot be loaded.
    """
    logging.getLogger("ts").setLevel(logging.ERROR)  # it warns about every optional backend that is missing
    context = tool_context(folder, manifest)
    description = HandlerDescription.load(ArchiveLayout(folder).handler_description)
    with importing_from(folder), without_other_variables():
        with _working_in(folder):
            handler = load_user_handler(manifest, context, _Messenger(), description)
        yield Preprocessing(handler, manifest["model"]["handler"], context, folder,
                            one_by_one=description.rows_per_request is None)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Run in the folder of the model, as a TorchServe worker does, and then go back, because our paths may be relative.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def tool_context(folder: Path, manifest: Mapping[str, Any]) -> HandlerContext:
    """Return the context that the handler of an extracted archive gets when a command runs it without a server.

    Args:
        folder: the folder of the extracted archive.
        manifest: the manifest that the user's handler expects.
    """
    model = manifest["model"]
    config = _config(folder, model)
    return HandlerContext(ToolContext(model["modelName"], str(folder)), manifest, config)


def archived_config(archive: ArchiveLayout) -> dict[str, Any]:
    """Return the model-config.yaml of an extracted archive; empty if it has none.

    Raises:
        ConfigError: the file cannot be read, or does not hold keys and values.
    """
    return _config(archive.root, read_manifest(archive.manifest)["model"])


def _config(folder: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    name = model.get("configFile")
    content = read_yaml(folder / name, "the configuration") if name else None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{name}: expected keys and values, found {type(content).__name__}")
    return content or {}


@contextmanager
def importing_from(folder: Path, *, forget: bool = True) -> Iterator[None]:
    """Import modules from a folder as a TorchServe worker does.

    Args:
        folder: the folder, first on sys.path inside the block.
        forget: whether modules of the folder are forgotten afterwards, as needed for a folder that will be deleted.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before if forget else ():
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).is_relative_to(folder):
                del sys.modules[name]
