"""The state of a model, on which its answers depend besides the inputs. Changes of the state are detected."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

_PLAIN = (bool, int, float, str)
_State = dict[str, object]


class ModelState:
    """A model's plain attributes, parts and weights at one moment; it does not keep any of them alive."""

    def __init__(self, model: nn.Module, *, tensors: bool = False) -> None:
        """Take the state of a model and of all its parts.

        Args:
            model: the model.
            tensors: whether the state includes tensors that are neither parameters nor buffers; some models keep
                intermediate values of a request in such tensors.
        """
        self._kinds = (*_PLAIN, Tensor) if tensors else _PLAIN
        self._parts = [(name, weakref.ref(part), part.training, _state_of(part, self._kinds))
                       for name, part in model.named_modules()]

    def changes(self) -> list[str]:
        """Return the names of everything that has changed; the end of training mode is not a change."""
        found: list[str] = []
        for name, reference, was_training, before in self._parts:
            part = reference()
            if part is None:
                continue
            if part.training and not was_training:
                found.append(f"{name or 'the model'} is in training mode")
            now = _state_of(part, self._kinds)
            if now != before:
                found += [f"{name}.{key}".strip(".") for key in sorted(now.keys() | before.keys())
                          if now.get(key) != before.get(key)]
        return found


def _state_of(part: nn.Module, kinds: tuple[type, ...]) -> _State:
    state: _State = {name: _value(value) for name, value in vars(part).items()
                     if type(value) in kinds and name != "training"}
    for inside in (part._parameters, part._buffers, part._modules):
        for name, value in inside.items():
            state[name] = _value(value)
    return state


def _value(value: object) -> object:
    """Return a key that stays equal while a value is unchanged: for a tensor, its id and its number of writes."""
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    return value if type(value) in _PLAIN else id(value)
