"""What a handler keeps from request to request, so that it is as before after a call that must leave no trace."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.user_handler.attributes import is_fixed, is_helper, module_of
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

_Restore = Callable[[], None]


@contextmanager
def state_kept(handler: UserHandler) -> Iterator[None]:
    """Restore after the block what a handler keeps in its attributes, in global names of its module and in its class.

    Lists, dictionaries, sets, queues, tensors, arrays and objects of the user's classes are restored at any depth, in
    place: a thread of the handler may wait for items in them. The attributes of the handler itself are not restored.
    """
    module = module_of(handler)
    roots: list[object] = [*vars(handler).values()]
    restores: list[_Restore] = []
    for owner in (module,) if isinstance(handler, FunctionHandler) else (module, type(handler)):
        held = _names_of(owner)
        restores.append(partial(_restore_names, owner, held))
        roots += held.values()
    restores += _restores_of(roots, module)
    try:
        yield
    finally:
        for restore in restores:
            with suppress(Exception):  # an object of the user may refuse; the others are restored all the same
                restore()


def _restores_of(roots: Iterable[object], module: ModuleType) -> Iterator[_Restore]:
    """Yield a function for each value that the roots reach; it restores the content that the value has now."""
    waiting, seen, n_bytes = deque(roots), set[int](), _MOST_BYTES
    while waiting and len(seen) < _MOST_VALUES:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, _CONTAINERS):
            yield _restore_of_container(value, copy.copy(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):
            waiting.extend(value)
        elif isinstance(value, Tensor):
            if value.nbytes <= n_bytes and not value.requires_grad:
                n_bytes -= value.nbytes
                yield _restore_of_tensor(value, value.clone())
        elif isinstance(value, SimpleNamespace) or is_helper(value, module):
            attributes = vars(value)
            yield _restore_of_container(attributes, dict(attributes))
            waiting.extend(attributes.values())
        else:
            with suppress(TypeError, ValueError, BufferError):  # no array, or one that cannot be written
                view = memoryview(value)  # type: ignore[arg-type]
                if not view.readonly and view.c_contiguous and view.nbytes <= n_bytes:
                    n_bytes -= view.nbytes
                    yield _restore_of_bytes(view.cast("B"), view.tobytes())


def _restore_of_container(container: Any, held: Any) -> _Restore:
    def restore() -> None:
        if _identities(container) != _identities(held):
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(held)

    return restore


def _restore_of_tensor(tensor: Tensor, held: Tensor) -> _Restore:
    def restore() -> None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if tensor.shape != held.shape or not torch.equal(tensor, held):
                tensor.copy_(held)

    return restore


def _restore_of_bytes(view: memoryview, held: bytes) -> _Restore:
    def restore() -> None:
        if view != held:
            view[:] = held

    return restore


def _names_of(owner: object) -> dict[str, Any]:
    """Return the attributes of a module or a class, except for those that are code."""
    return {name: value for name, value in vars(owner).items() if not is_fixed(name, value) and not isinstance(
        value, _CODE)}


def _restore_names(owner: object, held: Mapping[str, object]) -> None:
    for name in _names_of(owner).keys() - held.keys():
        delattr(owner, name)
    for name, value in held.items():
        if vars(owner).get(name, held) is not value:
            setattr(owner, name, value)


def _identities(container: Any) -> list[Any]:
    return [(key, id(inner)) for key, inner in container.items()] if isinstance(container, dict) else [
        id(inner) for inner in container]
