"""How a classifier is called: its inputs, and the place of the scores in its output."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.errors import GraphError, InputError, Unsupported

HALF_PRECISION = (torch.bfloat16, torch.float16)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class InputSpec:
    """One (B, *shape) input."""

    name: str
    """Name of the parameter of the model's forward."""
    shape: tuple[int, ...]
    """Shape of one item, without the batch dimension; texts are padded to one length."""
    dtype: str = "float32"
    """Name of the torch dtype."""
    limit: int | None = None
    """Integers below this are valid row numbers in every table in which they look up rows; None if there is no such
    table."""

    def zeros(self, n_rows: int) -> Tensor:
        return torch.zeros((n_rows, *self.shape), dtype=getattr(torch, self.dtype))

    def probe(self, *, positive: bool = False) -> Tensor:
        """Return a valid (1, *shape) input that is the same on every machine.

        Floats are in [-1, 1], or in [0.1, 1.1] if `positive`.
        """
        dtype = getattr(torch, self.dtype)
        count = torch.arange(torch.Size(self.shape).numel())
        if dtype.is_floating_point:
            values = torch.sin(count.double())
            values = values / 2 + 0.6 if positive else values
        else:  # an input without a limit may be a mask, and ones let everything through
            values = torch.ones_like(count) if self.limit is None else count % self.limit
        return values.to(dtype).reshape(1, *self.shape)


@dataclass(frozen=True)
class Parameters:
    """The parameters of the forward of a user's model."""

    positional: tuple[str, ...]
    """The names of the parameters that take arguments by position, in order."""
    rest: str | None = None
    """The name of the parameter that takes all other arguments by position, if there is one."""
    default_none: tuple[str, ...] = ()
    """The names of the parameters for which None means the same as no argument."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "positional", tuple(self.positional))  # JSON has lists, but no tuples
        object.__setattr__(self, "default_none", tuple(self.default_none))

    @classmethod
    def of(cls, forward: Callable[..., object]) -> Parameters:
        """Return the parameters of a model's forward."""
        parameters = inspect.signature(forward).parameters.values()
        rest = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_POSITIONAL]
        return cls(tuple(parameter.name for parameter in parameters if parameter.kind in _BY_POSITION),
                   rest[0] if rest else None,
                   tuple(parameter.name for parameter in parameters if parameter.default is None))

    def name(self, position: int) -> str | None:
        """Return the name of the argument at a position, or None if the model does not take so many."""
        if position < len(self.positional):
            return self.positional[position]
        return None if self.rest is None else f"{self.rest}{position - len(self.positional)}"

    def with_names(self, given: Sequence[object], named: Mapping[str, object]) -> dict[str, object]:
        """Return the arguments of a call by name, in the order of the call, without None where it means no argument.

        Args:
            given: positional arguments.
            named: named arguments.

        Raises:
            InputError: the model does not take so many arguments by position, or gets an argument twice.
        """
        names = [self.name(position) for position in range(len(given))]
        values = {name: value for name, value in zip(names, given) if name is not None}
        if len(values) < len(given) or not values.keys().isdisjoint(named):
            raise InputError(f"expected at most {', '.join(self.positional) or 'no arguments'} by position, found "
                             f"{len(given)} by position and {', '.join(named) or 'none'} by name")
        return self.without_none({**values, **named})

    def without_none(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """Return arguments by name, without None where it means the same as no argument."""
        return {name: value for name, value in arguments.items()
                if value is not None or name not in self.default_none}


@dataclass(frozen=True)
class OutputSpec:
    """The place of the (B, K) scores in the model's output."""

    kind: str = "tensor"
    """The type of the output: tensor, tuple, list, dict, or the class of an object, such as a named tuple, as
    'package.module:Class'."""
    key: str | int | None = None
    """Index or name of the scores in the output."""
    length: int = 1
    """Length of the output if it is a tuple or a list."""
    dtype: str = "float32"
    """Name of the torch dtype of the scores; exits compute with float32."""
    beside: tuple[str, ...] = ()
    """Names or indices of the model's other outputs, which an exported model does not return."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "beside", tuple(self.beside))  # JSON has lists, but no tuples

    @classmethod
    def of(cls, output: object, wanted: str | None = None) -> OutputSpec:
        """Find the scores: the only tensor of shape (batch, classes), or the one called 'logits'.

        Args:
            output: the model's output.
            wanted: name or index of the scores, needed if several tensors could be scores.

        Raises:
            GraphError: no tensor could be the scores, or several could.
        """
        if isinstance(output, Tensor):
            return cls()
        kind = f"{type(output).__module__}:{type(output).__qualname__}"
        fields: dict[Any, object] = {}
        length = 1
        if isinstance(output, (tuple, list)):
            fields, length = dict(enumerate(output)), len(output)
            if not hasattr(output, "_fields"):
                kind = "list" if isinstance(output, list) else "tuple"
        elif isinstance(output, Mapping) or is_dataclass(output):
            fields = dict(output) if isinstance(output, Mapping) else vars(output)
            kind = "dict" if type(output) is dict else kind
        places = {str(place): place for place, value in fields.items() if _is_scores(value)}
        if wanted is not None and wanted not in places:
            raise GraphError(f"expected --output to name one of {', '.join(places) or 'no outputs'}, found {wanted!r}")
        chosen = [wanted] if wanted is not None else [name for name in places if name == "logits"] or list(places)
        if len(chosen) > 1:
            raise GraphError(f"{len(chosen)} of the model's outputs could be the scores, {', '.join(chosen)}, and an "
                             "exit can replace only one: if the answer to a client needs only one of them, name it "
                             "with --output", Unsupported.SEVERAL_SCORES)
        if chosen:
            key = places[chosen[0]]
            return cls(kind, key, length, beside=tuple(
                str(place) for place, value in fields.items() if place != key and value is not None))
        raise GraphError(f"expected scores of shape (batch, classes), found {type(output).__name__}"
                         f"{_shapes(output)}: is this a classifier?")

    def scores(self, output: Any) -> Tensor:
        """Return the scores in an output of this kind."""
        if self.key is None:
            scores: Tensor = output
        else:
            has_keys = isinstance(output, (Mapping, tuple, list))
            scores = output[self.key] if has_keys else getattr(output, str(self.key))
        return scores

    def output(self, scores: Tensor) -> Any:
        """Return an output in the form of the model's, with these scores and nothing else in it.

        If the model returns an object whose class cannot be created from the scores alone, the result is a dict.
        """
        scores = scores.to(getattr(torch, self.dtype))
        if self.key is None:
            return scores
        values = [scores if index == self.key else None for index in range(self.length)]
        if self.kind in ("tuple", "list"):
            return values if self.kind == "list" else tuple(values)
        if ":" in self.kind:
            module, _, name = self.kind.partition(":")
            try:
                kind = getattr(importlib.import_module(module), name)
                return kind(*values) if issubclass(kind, tuple) else kind(**{str(self.key): scores})
            except (ImportError, AttributeError, TypeError):
                pass
        return {self.key: scores}


def bind(inputs: Sequence[InputSpec], given: Sequence[object], named: Mapping[str, object],
         constants: Mapping[str, object], parameters: Parameters | None) -> tuple[Tensor, ...]:
    """Return the tensors of a call in the order of the inputs.

    Args:
        inputs: the inputs that the backbone was exported for.
        given: positional arguments.
        named: named arguments.
        constants: the values besides the tensors that the backbone was exported for; other values are refused.
        parameters: the parameters of the user's model, or None if they are not known. Then an argument belongs to the
            next input or constant, and None before another argument is refused.

    Raises:
        InputError: the arguments are not those that the backbone was exported for.
    """
    expected = [spec.name for spec in inputs]
    values = (_in_order(expected, constants, given, named) if parameters is None else
              parameters.with_names(given, named))
    beside = {name: value for name, value in values.items() if name not in expected}
    if not values.keys() >= set(expected) or any(isinstance(value, Tensor) for value in beside.values()):
        raise _other_inputs(expected, given, named)
    if beside != dict(constants):
        raise InputError(f"expected {dict(constants) or 'nothing'} besides the tensors, found {beside}: the model was "
                         "exported for the expected values")
    tensors = []
    for spec in inputs:
        value = values[spec.name]
        if not isinstance(value, Tensor):
            raise InputError(f"expected a tensor of shape (batch, {spec.shape}), found {type(value).__name__}")
        if tuple(value.shape[1:]) != spec.shape or str(value.dtype) != f"torch.{spec.dtype}":
            raise InputError(f"expected {spec.dtype} input of shape {spec.shape}, found "
                             f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape[1:])}")
        tensors.append(value)
    if len({len(value) for value in tensors}) > 1:
        raise InputError(f"expected the same number of rows of each input, found {[len(value) for value in tensors]}")
    return tuple(tensors)


def _in_order(expected: Sequence[str], constants: Mapping[str, object], given: Sequence[object],
              named: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments of a call of a model whose parameters are not known, by name, without None.

    Raises:
        InputError: None comes before another argument, or there are too many arguments.
    """
    named = {name: value for name, value in named.items() if value is not None}
    while given and given[-1] is None:
        given = given[:-1]
    if any(value is None for value in given):
        raise InputError("the handler passes None by position, and another argument after it, but this archive, which "
                         "an earlier version made, or which has a program with other names than the model, does not "
                         "tell which parameter each argument is for: make the archive again with ee-archive, from the "
                         "one that you had before, and with a program that was exported from the model itself")
    tensors = [value for value in given if isinstance(value, Tensor)]
    others = [value for value in given if not isinstance(value, Tensor)]
    names = [name for name in constants if name not in named]
    if len(tensors) > len(expected) or len(others) > len(names):
        raise _other_inputs(expected, given, named)
    return {**dict(zip(expected, tensors)), **dict(zip(names, others)), **named}


def _other_inputs(expected: Sequence[str], given: Sequence[object], named: Mapping[str, object]) -> InputError:
    return InputError(f"expected the inputs {', '.join(expected)}, found {len(given)} by position and "
                      f"{', '.join(named) or 'none'} by name")


def _is_scores(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _shapes(output: object) -> str:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
    return f" with {shapes}" if shapes else ""
