"""What a handler keeps from request to request, so that it is as before after a call that must leave no trace."""

from __future__ import annotations

import copy
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.user_handler.attributes import comes_with, is_fixed, is_helper, module_of
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.entry_point import FunctionHandler, UserHandler

_CONTAINERS = (dict, list, set, deque)
_OPAQUE = (str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, nn.Module, threading.Thread,
           HandlerContext)
_CODE = (property, staticmethod, classmethod)
_MOST_VALUES = 10_000
"""The largest number of values that are searched; what lies beyond them is not restored."""
_MOST_BYTES = 2**26
"""The largest size of all tensors and arrays that are restored; those that do not fit are left out."""


class StateSharedError(Exception):
    """A value that a handler keeps has changed, perhaps in a thread of the handler, so it was not restored."""


@dataclass(frozen=True)
class _Held:
    """The content that a value had at one moment."""

    is_changed: Callable[[], bool]
    restore: Callable[[], None]


@contextmanager
def state_kept(handler: UserHandler) -> Iterator[None]:
    """Restore after the block what a handler keeps in its attributes, in global names of its module and in its class.

    Lists, dictionaries, sets, queues, tensors, arrays and objects of the user's classes are restored at any depth, in
    place: a thread of the handler may wait for items in them. The attributes of the handler itself are not restored.

    Raises:
        StateSharedError: a value has changed while a thread of the handler was alive. Nothing is restored, because
            the thread may have changed it, for example have taken an item from a queue.
    """
    module = module_of(handler)
    roots: list[object] = [*vars(handler).values()]
    held: list[_Held] = []
    for owner in (module,) if isinstance(handler, FunctionHandler) else (module, type(handler)):
        names = _names_of(owner)
        held.append(_held_names(owner, names))
        roots += names.values()
    held += _held_values(roots, module)
    has_threads = _has_threads(module)
    try:
        yield
    finally:
        changed = [value for value in held if _is_changed(value)]
        if changed and (has_threads or _has_threads(module)):
            raise StateSharedError
        for value in changed:
            with suppress(Exception):  # an object of the user may refuse; the others are restored all the same
                value.restore()


def _is_changed(held: _Held) -> bool:
    try:
        return held.is_changed()
    except Exception:  # such as a dict that a thread changes while it is compared
        return True


def _has_threads(module: ModuleType) -> bool:
    """Tell whether another thread runs code of the handler or may do so at any time, as a timer or an event loop."""
    frames: dict[Any, Any] = dict(sys._current_frames())
    del frames[threading.get_ident()]  # a frame that refers to itself would keep alive whatever its callers hold
    for thread in threading.enumerate():
        frame = frames.get(thread.ident)
        if frame is not None and isinstance(thread, threading.Timer):
            return True
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name == "asyncio.base_events" or comes_with(name, module):
                return True
            frame = frame.f_back
    return False


def _held_values(roots: Iterable[object], module: ModuleType) -> Iterator[_Held]:
    """Yield the content of each value that the roots reach."""
    waiting, seen, n_bytes = deque(roots), set[int](), _MOST_BYTES
    while waiting and len(seen) < _MOST_VALUES:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            yield _held_container(value, copy.copy(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):
            waiting.extend(value)
        elif isinstance(value, Tensor):
            if value.nbytes <= n_bytes and not value.requires_grad:
                n_bytes -= value.nbytes
                yield _held_tensor(value, value.clone())
        elif isinstance(value, SimpleNamespace) or is_helper(value, module):
            attributes = vars(value)
            yield _held_container(attributes, dict(attributes))
            waiting.extend(attributes.values())
        else:
            with suppress(TypeError, ValueError, BufferError):  # no array, or one that cannot be written
                view = memoryview(value)  # type: ignore[arg-type]
                if not view.readonly and view.c_contiguous and view.nbytes <= n_bytes:
                    n_bytes -= view.nbytes
                    yield _held_bytes(view.cast("B"), view.tobytes())


def _held_container(container: Any, content: Any) -> _Held:
    def restore() -> None:
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(content)

    return _Held(lambda: _identities(container) != _identities(content), restore)


def _held_tensor(tensor: Tensor, content: Tensor) -> _Held:
    def restore() -> None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(content)

    return _Held(lambda: tensor.shape != content.shape or not torch.equal(tensor, content), restore)


def _held_bytes(view: memoryview, content: bytes) -> _Held:
    def restore() -> None:
        view[:] = content

    return _Held(lambda: view != content, restore)


def _held_names(owner: object, names: Mapping[str, object]) -> _Held:
    def restore() -> None:
        for name in _names_of(owner).keys() - names.keys():
            delattr(owner, name)
        for name, value in names.items():
            if vars(owner).get(name, names) is not value:
                setattr(owner, name, value)

    return _Held(lambda: _identities(_names_of(owner)) != _identities(names), restore)


def _names_of(owner: object) -> dict[str, Any]:
    """Return the attributes of a module or a class, except for those that are code."""
    return {name: value for name, value in vars(owner).items() if not is_fixed(name, value) and not isinstance(
        value, _CODE)}


def _identities(container: Any) -> list[Any]:
    return [(key, id(inner)) for key, inner in container.items()] if isinstance(container, dict) else [
        id(inner) for inner in container]
