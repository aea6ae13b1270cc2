"""The places in which a user's code keeps its model. They are found by following names, and the model in them is
replaced."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from early_exit.handler.errors import ArchiveError
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.description import Place, Root

_DEEPEST = 6
"""The largest number of steps from a root; `_service.pipelines["cats"].model` has four."""
_MOST_OBJECTS = 100_000
_OPAQUE = (str, bytes, bytearray, int, float, complex, type(None), Tensor, type, ModuleType, FunctionType, MethodType,
           BuiltinFunctionType, HandlerContext)

Roots = Mapping[Root, object]


def modules_reached(roots: Roots) -> list[tuple[Place, nn.Module]]:
    """Return every torch module that names reach, nearest first, each module once for each of its places.

    Modules inside of a module are its parts, and are not returned separately.
    """
    return [(place, value) for place, value in _walk(roots) if isinstance(value, nn.Module)]


def places_of(roots: Roots, model: nn.Module) -> tuple[Place, ...]:
    """Return all places of a model, also those inside of a module that names reach."""
    reached = modules_reached(roots)
    places = [place for place, module in reached if module is model]
    for place, module in reached:
        places += [Place(place.root, (*place.steps, *(("attribute", step) for step in name.split("."))))
                   for name, part in module.named_modules() if part is model and part is not module]
    return tuple(dict.fromkeys(places))


def at(roots: Roots, place: Place) -> Any:
    """Return the object at a place.

    Raises:
        LookupError: there is no such place, or it is still None.
    """
    value = roots[place.root]
    for kind, step in place.steps:
        try:
            value = getattr(value, str(step)) if kind == "attribute" else value[step]  # type: ignore[index]
        except (AttributeError, LookupError, TypeError) as error:
            raise LookupError(f"there is no {place}: {error}") from error
    if value is None:
        raise LookupError(f"{place} is None")
    return value


def put(roots: Roots, place: Place, value: object) -> None:
    """Put an object at a place, where it replaces any other object.

    Raises:
        ArchiveError: the object that contains the place cannot be changed, such as a tuple.
    """
    holder = at(roots, Place(place.root, place.steps[:-1]))
    kind, step = place.steps[-1]
    try:
        if kind == "attribute" and isinstance(holder, nn.Module) and step in holder._modules:
            holder._modules[str(step)] = value if isinstance(value, nn.Module) else None
        elif kind == "attribute":
            setattr(holder, str(step), value)
        else:
            holder[step] = value
    except (AttributeError, TypeError) as error:
        raise ArchiveError(f"the handler keeps its model in {place}, where it cannot be replaced: {error}. Keep it in "
                           "an attribute, such as self.model") from error


def _walk(roots: Roots) -> Iterator[tuple[Place, object]]:
    folder = folder_of(roots.get(Root.MODULE))
    waiting = deque((Place(root, ()), value) for root, value in roots.items())
    expanded: set[int] = set()
    while waiting and len(expanded) < _MOST_OBJECTS:
        place, value = waiting.popleft()
        if place.steps:
            yield place, value
        if id(value) in expanded or len(place.steps) >= _DEEPEST or isinstance(value, nn.Module):
            continue
        expanded.add(id(value))
        for step, inner in _inside(value):
            if not isinstance(inner, _OPAQUE) or _is_of(folder, inner):
                waiting.append((Place(place.root, (*place.steps, step)), inner))


def _inside(value: object) -> Iterator[tuple[tuple[str, str | int], object]]:
    if isinstance(value, Mapping):
        yield from ((("item", key), inner) for key, inner in list(value.items()) if isinstance(key, (str, int)))
    elif isinstance(value, (list, tuple)):
        yield from ((("item", index), inner) for index, inner in enumerate(value))
    else:
        attributes: object = getattr(value, "__dict__", None)
        if isinstance(attributes, Mapping):  # a mappingproxy if `value` is a class
            yield from ((("attribute", name), inner) for name, inner in list(attributes.items())
                        if not name.startswith("__"))


def folder_of(module: object) -> Path | None:
    """Return the folder of a module's file, or None if it has no file."""
    file = getattr(module, "__file__", None)
    return Path(file).parent if file else None


def _is_of(folder: Path | None, value: object) -> bool:
    """Tell whether an object is a module in a folder, or a class of such a module: these may also hold a model."""
    if isinstance(value, type):
        value = sys.modules.get(value.__module__)
    return folder is not None and isinstance(value, ModuleType) and folder_of(value) == folder


def names_of(places: Sequence[Place]) -> str:
    """Return the text for places in a message."""
    return " and ".join(map(str, places))
