"""The classes that a module of the user defines."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any


def own_classes(module: ModuleType) -> list[type[Any]]:
    """Return the classes that a module defines itself. TorchServe requires exactly one in a handler or model file."""
    return [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
