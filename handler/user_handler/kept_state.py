"""What a handler keeps from request to request, so that it is as before after a call that must leave no trace."""

from __future__ import annotations

import copy
import pickle
import queue
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType, GeneratorType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.inference.containers import HOLDERS
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
    """What a handler keeps cannot be as it was after a call that must leave no trace."""


_CHANGED = ("what the handler keeps in its lists, dicts or arrays has changed while the worker checked this, perhaps "
            "in a thread of the handler, so the check cannot be undone and is not made again")
_MOVES_ON = ("the handler keeps an object of {kind}, which moves on whenever it is used and cannot be put back, so the "
             "worker cannot check this without a change to later answers")


@dataclass(frozen=True)
class _Held:
    """The content that a value had at one moment."""

    is_changed: Callable[[], bool]
    restore: Callable[[], object]


@contextmanager
def state_kept(handler: UserHandler) -> Iterator[None]:
    """Restore after the block what a handler keeps in its attributes, in global names of its module and in its class.

    Lists, dictionaries, sets, queues, tensors, arrays, generators of random numbers and objects of the user's classes
    are restored at any depth, in place: a thread of the handler may wait for items in them.

    Raises:
        StateSharedError: a value has changed while a thread of the handler was alive. Nothing is restored, because
            the thread may have changed it, for example have taken an item from a queue. Or, before the block, the
            handler keeps an iterator or a queue whose state cannot be read.
    """
    module = module_of(handler)
    roots: list[object] = [*vars(handler).values()]
    # A call with a copy of the handler changes the handler itself through methods that the handler keeps.
    held = [_held_container(vars(handler), dict(vars(handler))), *filter(None, map(_held_random, _shared_generators()))]
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
            raise StateSharedError(_CHANGED)
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
        elif (numbers := _held_random(value)) is not None:
            yield numbers
        elif isinstance(value, (*HOLDERS, queue.Queue)) or is_helper(value, module):
            attributes = vars(value)
            yield _held_container(attributes, dict(attributes))
            waiting.extend(attributes.values())
        elif _moves_on(value):
            raise StateSharedError(_MOVES_ON.format(kind=f"{type(value).__module__}.{type(value).__qualname__}"))
        else:
            with suppress(TypeError, ValueError, BufferError):  # no array, or one that cannot be written
                view = memoryview(value)  # type: ignore[arg-type]
                if not view.readonly and view.c_contiguous and view.nbytes <= n_bytes:
                    n_bytes -= view.nbytes
                    yield _held_bytes(view.cast("B"), view.tobytes())


def _moves_on(value: object) -> bool:
    """Tell whether a value changes whenever it is used, and cannot be put back."""
    return type(value).__module__ == "itertools" or isinstance(value, queue.SimpleQueue) or (
        isinstance(value, GeneratorType) and value.gi_frame is not None)


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


def _shared_generators() -> list[object]:
    """Return the generators of random numbers of everybody who has none of his own: of Python, torch and NumPy."""
    return [random, torch.default_generator, *torch.cuda.default_generators, sys.modules.get("numpy.random")]


def _held_random(value: Any) -> _Held | None:
    """Return the state of a generator of random numbers, or None for any other value."""
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    is_numpys = type(value).__module__.startswith("numpy.random") or value is sys.modules.get("numpy.random", random)
    if value is random or (isinstance(value, random.Random) and not isinstance(value, random.SystemRandom)):
        read, write = value.getstate, lambda state: value.setstate(state)
    elif isinstance(value, torch.Generator):
        read, write = (lambda: value.get_state().tolist()), lambda state: value.set_state(torch.tensor(
            state, dtype=torch.uint8))
    elif is_numpys and hasattr(value, "get_state"):
        read, write = value.get_state, value.set_state
    elif is_numpys and hasattr(value, "bit_generator"):
        source = value.bit_generator
        read, write = (lambda: source.state), lambda state: setattr(source, "state", state)
    else:
        return None
    before = read()
    return _Held(lambda: pickle.dumps(read()) != pickle.dumps(before), lambda: write(before))


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
