"""The object that the user's handler holds in place of its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from early_exit.handler.user_handler.model_state import ModelState


class NotExported(AttributeError, TypeError):
    """A handler uses something of its model that the exported model does not have; the client is not at fault."""

    error_code = 500


class StandIn(nn.Module):
    """Replaces the user's model: another model answers its calls, and its other attributes remain available.

    If the user's own model is kept, all attributes are those of that model, including parameters and their names. Its
    methods are bound to this object, so the other model answers the calls in them. If the user's model is not kept,
    parameters, buffers, device and dtype are those of the model that answers.
    """

    written: list[str]
    """What the handler has set of the model, which has no effect on the model that answers."""

    def __init__(self, model: nn.Module, original: nn.Module | None = None, *, is_fixed: bool = False,
                 replaced: nn.Module | None = None) -> None:
        """Replace a model.

        Args:
            model: the model that answers.
            original: the user's own model, or None if it is not kept.
            is_fixed: whether to refuse setting attributes that the user's own model may compute with, such as a
                temperature, because `model` would answer as if they had not been set.
            replaced: the user's own model, kept or not. The handler may still hold parts of it. If a part changes, the
                next call raises `NotExported`.
        """
        super().__init__()
        self.answering = model
        # Not registered as a submodule: its parameters would be listed, moved and converted with ours. A module is
        # compared with None, because its truth may be its length: a compiled module has none, and raises.
        object.__setattr__(self, "_original", None if original is None else original.requires_grad_(False))
        self.training = model.training
        object.__setattr__(self, "_is_fixed", is_fixed)
        # A model that was in training mode from the start has nothing that answers differently in that mode.
        may_train = not is_fixed or self.training or (replaced is not None and replaced.training)
        object.__setattr__(self, "_may_train", may_train)
        object.__setattr__(self, "_state", None if replaced is None else ModelState(replaced, tensors=True))
        object.__setattr__(self, "_hooks", self._hooks_now())
        object.__setattr__(self, "written", [])

    def forward(self, *given: object, **named: object) -> Any:
        """Answer as the user's model would.

        A hook in the user's model sees activations only if that model runs, so a model with hooks is run as well. The
        answer is then the output of the user's model if its hooks are not those that were exported with it, because
        they may change activations. It is also that output if a hook inserts values that require gradients, as
        explanations by the activations of a layer do. Nothing else in that model requires gradients.

        Raises:
            NotExported: the handler has changed a part of the user's model, or has set it to training mode.
        """
        if self.training and not vars(self)["_may_train"]:
            raise _changed(".training")
        state: ModelState | None = vars(self)["_state"]
        if state is not None and (changed := state.changes()):
            raise _changed(", ".join(f".{name}" for name in changed[:3]))
        hooks, exported = self._hooks_now(), vars(self)["_hooks"]
        if self._original is None and hooks - exported:
            raise _changed("the hooks")
        if self._original is not None and (hooks or exported):
            # The user's model may write into its input.
            own = [_own(value) for value in given], {name: _own(value) for name, value in named.items()}
            output = self._original(*given, **named)
            if state is not None:  # a model may keep values of a request in its attributes
                object.__setattr__(self, "_state", ModelState(self._original, tensors=True))
            if hooks != exported or _has_gradients(output):
                return output
            given, named = tuple(own[0]), own[1]
        return self.answering(*given, **named)

    def _hooks_now(self) -> set[int]:
        """Return torch's numbers, which are never used again, of the hooks in the user's model and in all its parts; if
        it is not kept, in those parts that the handler still holds."""
        state: ModelState | None = vars(self)["_state"]
        parts = self._original.modules() if self._original is not None else state.parts() if state is not None else ()
        return {hook for part in parts for hook in (*part._forward_hooks, *part._forward_pre_hooks)}

    def named_modules(self, *given: Any, **named: Any) -> Any:
        """Yield the parts of the user's own model by name. If it is not kept, only initialize() may ask for parts.

        Raises:
            NotExported: the model answers requests already, and has other parts than the user's.
        """
        known: Any = self._with_parts() if self._original is not None or vars(self)["_is_fixed"] else super()
        return known.named_modules(*given, **named)

    def named_children(self) -> Any:
        """Yield the direct parts, as `named_modules` does for all; `apply` and `children` follow from them."""
        known: Any = self._with_parts() if self._original is not None or vars(self)["_is_fixed"] else super()
        return known.named_children()

    def _named_members(self, *given: Any, **named: Any) -> Any:
        """Yield parameters or buffers by name, of the user's own model if it is kept."""
        known: Any = self.answering if self._original is None else self._original
        return known._named_members(*given, **named)

    def train(self, mode: bool = True) -> StandIn:
        self.training = mode
        for model in self._both():
            model.train(mode)
        return self

    def _apply(self, *given: Any, **named: Any) -> StandIn:
        for model in self._both():
            model._apply(*given, **named)  # type: ignore[no-untyped-call]
        return self

    def _both(self) -> list[nn.Module]:
        return [self.answering] if self._original is None else [self.answering, self._original]

    def state_dict(self, *given: Any, **named: Any) -> Any:
        """Return the weights of the user's own model by name, if it is kept."""
        known: Any = super() if self._original is None else self._original
        return known.state_dict(*given, **named)

    def load_state_dict(self, *given: Any, **named: Any) -> Any:
        """Load weights, which a handler may do in initialize() only.

        Raises:
            NotExported: the model answers requests already.
        """
        if vars(self)["_is_fixed"]:
            raise _changed("the weights")
        self.written.append("the weights")
        return super().load_state_dict(*given, **named)

    def __getitem__(self, key: Any) -> Any:
        return self._with_parts()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._with_parts())

    def __len__(self) -> int:
        return len(self._with_parts())

    def __bool__(self) -> bool:
        return True

    def _with_parts(self) -> Any:
        if self._original is None:
            raise NotExported("the handler asks its model for its parts, which the exported model does not have: make "
                              "the archive again with a --request whose answer needs them, so that ee-archive keeps "
                              "the original model")
        return self._original

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" and vars(self).get("_is_fixed") and not self._is_as_it_was(name, value):
            raise _changed(f".{name}")
        if name != "training" and "written" in vars(self):  # otherwise, `__init__` sets it
            self.written.append(f".{name}")
        super().__setattr__(name, value)

    def _is_as_it_was(self, name: str, value: object) -> bool:
        """Tell whether the user's own model, if it is kept, has this value already, or no attribute of this name."""
        if self._original is None:
            return False
        before = getattr(self._original, name, value)
        return before is value or (isinstance(value, (bool, int, float, str)) and before == value)

    def __getattr__(self, name: str) -> Any:
        if name == "_original":  # not set yet
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        if self._original is not None:
            value = getattr(self._original, name)
            method = getattr(type(self._original), name, None)
            return MethodType(method, self) if isinstance(method, FunctionType) else value
        if name in ("device", "dtype"):
            return getattr(next(self.answering.parameters()), name)
        raise NotExported(f"the handler asks its model for .{name}, which the exported model does not have: make "
                          "the archive again with a --request whose answer needs it, so that ee-archive keeps the "
                          "original model")


def _changed(names: str) -> NotExported:
    return NotExported(f"the handler changes {names} of its model while it answers, but the exported model computes as "
                       "it did when the archive was made: set it once, in initialize(), or make it an input of the "
                       "model")


def _own(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def _has_gradients(output: object) -> bool:
    if isinstance(output, Tensor):
        return output.requires_grad
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return any(_has_gradients(value) for value in values)
