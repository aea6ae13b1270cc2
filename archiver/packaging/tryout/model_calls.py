"""Records which torch modules a handler calls, and with which arguments."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.user_handler.model_state import ModelState


@dataclass(frozen=True)
class ModelCall:
    """One call of a module that no other module made."""

    module: nn.Module
    given: tuple[Any, ...]
    """The positional arguments; their tensors are copies."""
    named: dict[str, Any]
    is_training: bool
    """Whether the module was in training mode."""
    returned: tuple[tuple[int, ...], ...] = ()
    """The shapes of the returned tensors that have at least one dimension."""
    changed: tuple[str, ...] = ()
    """The parts of the module that had changed since before the first call of the same recording."""


@contextmanager
def recorded_calls(reached: Sequence[nn.Module]) -> Iterator[list[ModelCall]]:
    """Collect the calls of modules that are not made by other modules, in the order in which they end.

    Args:
        reached: modules whose `forward` may be called directly, without `__call__`.
    """
    calls: list[ModelCall] = []
    inside = threading.local()
    states = {module: ModelState(module, numbers=True) for module in reached}

    def noted(module: nn.Module, call: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if getattr(inside, "module", None) is not None:
            return call(*given, **named)
        copied, is_training = (_copy(given), _copy(named)), module.training
        if module not in states:
            states[module] = ModelState(module, numbers=True)
        changed = states[module].changes()
        inside.module = module
        try:
            result = call(*given, **named)
        finally:
            inside.module = None
        calls.append(ModelCall(module, *copied, is_training, _shapes(result), tuple(changed)))
        return result

    original = nn.Module.__call__
    forwards = {}

    def called(self: nn.Module, *given: Any, **named: Any) -> Any:
        return noted(self, lambda *a, **k: original(self, *a, **k), given, named)

    nn.Module.__call__ = called  # type: ignore[method-assign]
    for module in reached:
        if not isinstance(module, torch.jit.ScriptModule) and "forward" not in vars(module):
            forwards[module] = module.forward
            object.__setattr__(module, "forward", lambda *a, _m=module, **k: noted(_m, forwards[_m], a, k))
    try:
        yield calls
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
        for module in forwards:
            object.__delattr__(module, "forward")


def n_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters; 0 if they cannot be counted."""
    try:
        return sum(parameter.numel() for parameter in module.parameters())
    except Exception:  # packed modules, for example, keep their weights elsewhere
        return 0


def _shapes(output: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(output, Mapping):
        output = list(output.values())
    values = output if isinstance(output, (list, tuple)) else [output]
    return tuple(tuple(value.shape) for value in values if isinstance(value, Tensor) and value.dim())


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(inner) for inner in value) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return value
