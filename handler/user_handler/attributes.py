"""The attributes of a handler: each of several calls in progress sees its own values of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from early_exit.handler.inference.contents import KeptContents
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.entry_point import FunctionHandler, UserHandler
from early_exit.handler.user_handler.places import folder_of

_State = list[dict[str, Any]]


class HandlerAttributes:
    """Lets calls of one handler wait in the middle. Each call has a thread, and only one of the threads runs at a time.

    Before it waits, a call may set attributes on the handler, on its context, on its module (global names) or on
    objects of the user that these reach. It may also change the lists, dicts and sets that all these contain. When the
    call continues, it finds its own values. Of all other calls, only those that begin after its end see these values.
    All calls use the same handler object, because other objects may hold its methods, for example a hook in its model.
    """

    def __init__(self, handler: UserHandler, context: HandlerContext) -> None:
        nothing: frozenset[str] = frozenset()
        module = module_of(handler)
        fixed = frozenset(name for name, value in vars(module).items() if is_fixed(name, value))
        self._objects = [(vars(handler), nothing), (vars(context), nothing), context.put_on_it(), (vars(module), fixed),
                         *((vars(helper), nothing) for helper in _helpers(module, handler))]
        self._classes = [kind for helper in (handler, *_helpers(module, handler)) for kind in type(helper).__mro__
                         if kind.__module__ == type(helper).__module__]
        self._contents = KeptContents(self._values, lambda value: is_helper(value, module))
        self._call = threading.local()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run a call of the handler inside the block."""
        before = self._call.shared = self._state()
        try:
            with self._contents.call():
                yield
        except BaseException:
            self._restore(self._call.shared)
            raise
        after = self._state()
        self._restore(self._call.shared)
        for (attributes, _), old, new in zip(self._objects, before, after):
            attributes.update({name: value for name, value in new.items()
                               if name not in old or old[name] is not value})

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let other calls run inside the block; a call of the handler enters it while it waits."""
        own = self._state()
        try:
            with self._contents.waiting():
                self._restore(self._call.shared)
                try:
                    yield
                finally:
                    self._call.shared = self._state()
        finally:
            self._restore(own)

    def _values(self) -> Iterator[object]:
        for attributes, fixed in self._objects:
            yield from [value for name, value in [*attributes.items()] if name not in fixed]
        for kind in self._classes:
            yield from [*vars(kind).values()]

    def _state(self) -> _State:
        # Copied first, because a thread of the handler may set an attribute meanwhile.
        return [{name: value for name, value in [*attributes.items()] if name not in fixed}
                for attributes, fixed in self._objects]

    def _restore(self, state: _State) -> None:
        for (attributes, fixed), values in zip(self._objects, state):
            for name in [name for name in attributes if name not in fixed and name not in values]:
                del attributes[name]
            attributes.update(values)


def _helpers(module: ModuleType, handler: UserHandler) -> list[object]:
    """Return the objects that the names of a handler reach and whose attributes the user's code may set.

    These are objects of classes that come with the handler, and of TorchServe's handlers; the handler itself is not
    among them.
    """
    found: dict[int, object] = {id(handler): handler}
    waiting: list[object] = [handler, module]
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            inside = value.values() if isinstance(value, dict) else value
            for one in list(inside) if isinstance(value, (dict, list, tuple)) else [value]:
                if id(one) not in found and is_helper(one, module):
                    found[id(one)] = one
                    waiting.append(one)
    return [*found.values()][1:]


def module_of(handler: UserHandler) -> ModuleType:
    """Return the module whose global names a handler uses."""
    return handler.module if isinstance(handler, FunctionHandler) else sys.modules[type(handler).__module__]


def is_fixed(name: str, value: object) -> bool:
    """Tell whether a global name is part of the code, so that no call of a handler changes it."""
    return name.startswith("__") or isinstance(value, (ModuleType, type, FunctionType))


def is_helper(value: object, module: ModuleType) -> bool:
    """Tell whether a value has attributes that a handler may set: an object of a class that comes with the handler's
    module, or of TorchServe's handlers."""
    # A thread may use its own attributes at any time, even while a call waits.
    if isinstance(value, (type, nn.Module, threading.Thread, HandlerContext)) or not isinstance(
            getattr(value, "__dict__", None), Mapping):
        return False
    return comes_with(type(value).__module__, module)


def comes_with(name: str, module: ModuleType) -> bool:
    """Tell whether the module with a name is a handler's module, one beside it, or one of TorchServe's handlers."""
    folder = folder_of(module)
    return name == module.__name__ or name.startswith("ts.torch_handler.") or (
        folder is not None and folder_of(sys.modules.get(name)) == folder)
