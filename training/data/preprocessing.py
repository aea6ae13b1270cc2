"""What the user's handler makes of recorded requests, without a server."""

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
        """Take a handler that is loaded.

        Args:
            handler: the user's, around a model that ends its work.
            name: of the handler, for errors.
            context: the handler's.
            folder: the archive.
            one_by_one: whether its rows of several requests cannot be told apart.
        """
        self._handler, self._name, self._context, self._folder = handler, name, context, folder
        self._one_by_one = one_by_one

    def model_inputs(self, requests: Sequence[KeptRequest | None], model: BackboneDescription,
                     skipped: Skipped) -> tuple[list[int], Live]:
        """Return what the handler gives its model for requests as they were handed to it when they were recorded.

        Args:
            requests: None stands for one that could not be kept.
            model: that the handler calls.
            skipped: counts those for which the handler fails, or calls its model otherwise than with one row.

        Returns:
            The M positions of the other requests, ascending, and (M, ...) tensors, in the order of the model's inputs;
            none where M is 0.
        """
        known = [(position, request) for position, request in enumerate(requests) if request is not None]
        for _ in range(len(requests) - len(known)):
            skipped.count(NOT_KEPT)
        if len(known) > 1 and not self._one_by_one:
            with suppress(ArchiveError, InputError):  # alone it is seen which of them is to blame
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
        """Return the (B, ...) tensors that the handler gives its model for B requests.

        Raises:
            ArchiveError: the handler fails, or does not make one row of each request.
            InputError: it gives its model something else.
        """
        # A handler may change what it is given, and is given it again.
        calls = [copy.deepcopy(request).call(f"request-{number}") for number, request in enumerate(requests)]
        self._context.begin(calls)
        try:
            with _working_in(self._folder):
                self._handler.handle([call.inputs for call in calls], self._context)
        except ModelReached as reached:
            batch = bind(model.inputs, reached.given, reached.named, model.constants)
        except Exception as error:  # the user's own code may raise anything
            raise ArchiveError(f"{self._name} fails on a request with {type(error).__name__}: {error}") from error
        else:
            raise ArchiveError(f"{self._name} answers a request without calling self.model")
        if len(batch[0]) != len(requests):
            raise ArchiveError(f"{self._name} makes {len(batch[0])} rows of {len(requests)} requests, where one of "
                               "each is expected")
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
    logging.getLogger("ts").setLevel(logging.ERROR)  # it warns of every optional backend that is not installed
    context = tool_context(folder, manifest)
    description = HandlerDescription.load(ArchiveLayout(folder).handler_description)
    with importing_from(folder), without_other_variables():
        with _working_in(folder):
            handler = load_user_handler(manifest, context, _Messenger(), description)
        yield Preprocessing(handler, manifest["model"]["handler"], context, folder,
                            one_by_one=description.rows_per_request is None)


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Be where a TorchServe worker runs, in the folder of its model, and no longer: our own paths may be relative."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def tool_context(folder: Path, manifest: Mapping[str, Any]) -> HandlerContext:
    """Return the context of a worker of an extracted archive, in a tool.

    Args:
        folder: the archive.
        manifest: the manifest that the user's handler expects.
    """
    model = manifest["model"]
    config = _config(folder, model)
    return HandlerContext(ToolContext(model["modelName"], str(folder)), manifest, config)


def archived_config(archive: ArchiveLayout) -> dict[str, Any]:
    """Return the model-config.yaml of an extracted archive; empty where it has none.

    Raises:
        ConfigError: it cannot be read, or holds no keys and values.
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
    """Import as a TorchServe worker does in that folder.

    Args:
        folder: first on sys.path inside the block.
        forget: whether modules of the folder are removed afterwards, for one that is about to disappear.
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
