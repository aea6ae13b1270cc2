"""The state of a model, on which its answers depend besides the inputs. Changes of the state are detected."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn

from early_exit.handler.inference.containers import HOLDERS

_PLAIN = (bool, int, float, str)
_State = dict[str, object]
_OF_TORCH = frozenset(vars(nn.Module()))
"""The attributes that every module has, such as its hooks."""
_MANY = 256
"""The values in a longer list, dict or object are not compared, because every request would wait for that."""

_DEEPEST = 3
"""Values in lists, dicts and objects are compared down to this depth."""
_OTHERS = frozenset({*sys.stdlib_module_names, "torch", "numpy"})
"""Packages whose objects are not searched, such as loggers and locks, if they are inside of others."""
_SAMPLED = 1024
"""At least so many numbers of each weight are compared, where numbers are compared."""


class ModelState:
    """A model's plain attributes, parts and weights at one moment; it does not keep any of them alive."""

    def __init__(self, model: nn.Module, *, tensors: bool = False, numbers: bool = False) -> None:
        """Take the state of a model and of all its parts.

        Args:
            model: the model.
            tensors: whether the state includes tensors that are neither parameters nor buffers, and the values in
                lists, dicts and objects; some models keep intermediate values of a request there. It then also includes
                the attributes of the user's classes, and the global names that their forward may read.
            numbers: whether the state includes some numbers of each weight, because torch does not count writes through
                `.data`. Every request would wait for that.
        """
        self._tensors, self._numbers = tensors, numbers
        seen: set[int] = set()
        self._parts = [(name, weakref.ref(part), part.training, _state_of(part, seen, tensors=tensors, numbers=numbers))
                       for name, part in model.named_modules()]
        kinds = {kind for part in model.modules() for kind in type(part).__mro__} if tensors else ()
        self._classes = {kind: _state_of_class(kind) for kind in kinds
                         if issubclass(kind, nn.Module) and not kind.__module__.startswith("torch.")}

    def parts(self) -> list[nn.Module]:
        """Return the model and its parts, those that are still alive."""
        return [part for _, reference, *_ in self._parts if (part := reference()) is not None]

    def changes(self) -> list[str]:
        """Return the names of everything that has changed; the end of training mode is not a change."""
        found: list[str] = []
        seen: set[int] = set()
        for kind, of_class in self._classes.items():
            now = _state_of_class(kind)
            found += sorted(key for key in of_class if _differs(now.get(key), of_class[key]))
        for name, reference, was_training, before in self._parts:
            part = reference()
            if part is None:
                continue
            if part.training and not was_training:
                found.append(f"{name or 'the model'} is in training mode")
            now = _state_of(part, seen, tensors=self._tensors, numbers=self._numbers)
            if now != before:
                # Reading may add a value to a dict or an object, as a cached property does.
                found += [f"{name}.{key}".strip(".") for key in sorted(now.keys() | before.keys())
                          if _differs(now.get(key), before.get(key)) and (key in before or not _is_inside(key))]
        return found


def _differs(now: object, before: object) -> bool:
    return now is not before and now != before  # NaN is not equal to itself


def _state_of(part: nn.Module, seen: set[int], *, tensors: bool, numbers: bool) -> _State:
    """Return the state of one part.

    Args:
        part: the part.
        seen: the ids of lists, dicts and objects whose values other parts have, such as one configuration for all
            parts; those of this part are added.
        tensors, numbers: as for `ModelState`.
    """
    kinds = (*_PLAIN, Tensor) if tensors else _PLAIN
    state: _State = {name: _value(value) for name, value in vars(part).items()
                     if type(value) in kinds and name != "training"}
    for name, value in vars(part).items():
        if tensors and name not in _OF_TORCH and type(value) not in kinds and id(value) not in seen:
            seen.add(id(value))
            state.update(_inside(name, value, seen))
    for inside in (part._parameters, part._buffers, part._modules):
        for name, value in inside.items():
            state[name] = _value(value, numbers=numbers)
    return state


def _state_of_class(kind: type) -> _State:
    """Return the state of a module's class: its plain attributes, and the global names that its forward may read."""
    state: _State = {f"{kind.__name__}.{name}": value for name, value in vars(kind).items()
                     if type(value) in _PLAIN and not name.startswith("__")}
    forward = vars(kind).get("forward")
    if isinstance(forward, FunctionType):
        names, known = forward.__code__.co_names, forward.__globals__
        state.update(_values_in([(f"{kind.__module__}.{name}", known[name]) for name in names if name in known], set()))
    return state


def _inside(name: str, value: object, seen: set[int], depth: int = 1) -> Iterator[tuple[str, object]]:
    """Yield the plain values and tensors in an attribute that is a list, a dict or an object, with their names."""
    if isinstance(value, (list, tuple)):
        values = [(f"{name}[{number}]", inner) for number, inner in enumerate(value[:_MANY + 1])]
    elif isinstance(value, dict):
        values = [(f"{name}[{key!r}]", inner) for key, inner in value.items()] if len(value) <= _MANY else []
    elif isinstance(value, (nn.Module, Tensor, ModuleType, type)):
        values = []
    else:
        values = [(f"{name}.{key}", inner) for key, inner in getattr(value, "__dict__", {}).items()]
    if len(values) <= _MANY:
        yield from _values_in(values, seen, depth)


def _values_in(values: Sequence[tuple[str, object]], seen: set[int], depth: int = 0) -> Iterator[tuple[str, object]]:
    for key, value in values:
        if type(value) in _PLAIN or isinstance(value, Tensor):
            yield key, _value(value)
        elif depth < _DEEPEST and id(value) not in seen and _is_setting(value):
            seen.add(id(value))
            yield from _inside(key, value, seen, depth + 1)


def _is_setting(value: object) -> bool:
    """Tell whether a value may hold settings: a container, or an object of the user's code or of a library of his."""
    return isinstance(value, (list, tuple, dict, *HOLDERS)) or type(value).__module__.partition(".")[0] not in _OTHERS


def _is_inside(key: str) -> bool:
    return "." in key or "[" in key


def _value(value: object, *, numbers: bool = False) -> object:
    """Return a key that stays equal while a value is unchanged: for a tensor, its id, the number of writes that torch
    counts and, if `numbers`, some of its numbers."""
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version, _numbers_in(value) if numbers else b""
    return value if type(value) in _PLAIN else id(value)


def _numbers_in(weight: Tensor) -> bytes:
    """Return some numbers of a weight, at equal distances; none if its numbers cannot be read one by one."""
    try:
        sample = weight.detach().reshape(-1)[::max(1, weight.numel() // _SAMPLED)]
        return sample.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    except RuntimeError:  # it is sparse, for example, or on no device
        return b""
