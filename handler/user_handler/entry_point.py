"""The entry point of a handler file, which TorchServe calls: a function, or an object of the only class in the file."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Protocol

from early_exit.handler.errors import ArchiveError
from early_exit.handler.python_modules import own_classes
from early_exit.handler.user_handler.description import Root
from early_exit.handler.user_handler.places import Roots


class UserHandler(Protocol):
    """The entry point of a handler file."""

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]: ...


class FunctionHandler:
    """A handler that is a function of its module, which is called without data to initialize it."""

    def __init__(self, module: ModuleType, function: str) -> None:
        self.module = module
        self._function = getattr(module, function)

    def initialize(self, context: Any) -> None:
        self._function(None, context)

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        answers: list[Any] = self._function(data, context)
        return answers


def load_entry_point(name: str) -> tuple[UserHandler, Roots]:
    """Import a handler as TorchServe does.

    Args:
        name: the manifest's `handler`: a file, a built-in handler of TorchServe, or either with ":function".

    Returns:
        The entry point, which is not initialized, and the roots of its names.

    Raises:
        ArchiveError: there is no such handler.
    """
    file, _, function = name.partition(":")
    module = import_handler(file.split("/")[-1].removesuffix(".py"))
    if hasattr(module, function or "handle"):
        called = FunctionHandler(module, function or "handle")
        return called, {Root.HANDLER: called, Root.MODULE: module}
    classes = own_classes(module)
    if len(classes) != 1 or not hasattr(classes[0], "handle"):
        raise ArchiveError(f"expected a function handle(data, context) or one class with handle() in {name}, found "
                           f"{', '.join(kind.__name__ for kind in classes) or 'neither'}")
    handler = classes[0]()
    return handler, {Root.HANDLER: handler, Root.MODULE: module}


def import_handler(name: str) -> ModuleType:
    """Import the module of a handler file or of a built-in handler of TorchServe.

    Raises:
        ArchiveError: there is no such module, or it needs a module that is not installed.
    """
    # TorchServe's base handler imports OpenVINO's backend of torch.compile if that is installed. This takes five
    # seconds of CPU time at every start, for a compiler that never sees our model.
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
