"""The user's own handler, which keeps doing pre- and post-processing around a replaced model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

from torch import nn

from early_exit.handler.errors import ArchiveError
from early_exit.handler.python_modules import own_classes
from early_exit.handler.user_handler.context import HandlerContext


class UserHandler(Protocol):
    """A TorchServe handler object."""

    model: Any

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]: ...


def load_user_handler(manifest: Mapping[str, Any], context: HandlerContext, model: nn.Module) -> UserHandler:
    """Create the handler that a manifest names, with `model` in place of its own.

    A handler that loads its model through TorchServe's BaseHandler gets ours without reading any weights;
    one that loads its model itself does so, and the result is replaced.

    Args:
        manifest: the archive's original manifest.
        context: what the handler sees of the worker.
        model: what `handler.model` becomes.

    Raises:
        ArchiveError: the handler cannot be found, or does not keep its model in `self.model`.
    """
    handler = handler_class(manifest["model"]["handler"])()
    for loader in ("_load_pickled_model", "_load_torchscript_model"):
        if hasattr(handler, loader):
            setattr(handler, loader, lambda *args, **kwargs: model)
    handler.initialize(context)
    if not isinstance(getattr(handler, "model", None), nn.Module):
        raise ArchiveError(f"{type(handler).__name__} does not keep its model in 'self.model' after initialize(), so "
                           "it cannot be given one with early exits: store the model there and call it from there")
    handler.model = model
    loaded: UserHandler = handler
    return loaded


def handler_class(name: str) -> type[Any]:
    """Return the class of a custom handler file or of one of TorchServe's built-in handlers.

    Raises:
        ArchiveError: there is none.
    """
    module_name = name.split("/")[-1].removesuffix(".py")
    module = _import_handler(module_name)
    classes = own_classes(module)
    if len(classes) != 1 or not hasattr(classes[0], "handle"):
        raise ArchiveError(f"expected one handler class with handle() in {module_name}, found "
                           f"{[kind.__name__ for kind in classes] or 'none'}: a module-level handle function keeps its "
                           "model out of reach, so turn it into a class that keeps it in 'self.model'")
    return classes[0]


def _import_handler(name: str) -> ModuleType:
    # TorchServe's base handler imports OpenVINO's backend of torch.compile wherever that is installed: five seconds of
    # CPU at every start, for a compiler that never sees our model.
    sys.modules.setdefault("openvino.torch", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ArchiveError(f"the handler {name} needs {error.name!r}, which is not installed") from error
    try:
        return importlib.import_module(f"ts.torch_handler.{name}")
    except ModuleNotFoundError as error:
        raise ArchiveError(f"cannot import the handler {name!r}: no such file in the archive, and as a built-in "
                           f"handler of TorchServe it fails with: {error}") from error
