"""Loads the user's own handler and replaces its model; the handler still does pre- and post-processing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from early_exit.handler.backbone.export import unwrapped
from early_exit.handler.errors import ArchiveError
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.description import HandlerDescription, Loading
from early_exit.handler.user_handler.entry_point import UserHandler, load_entry_point
from early_exit.handler.user_handler.places import Roots, at, names_of, put
from early_exit.handler.user_handler.stand_in import StandIn

LOADERS = ("_load_pickled_model", "_load_torchscript_model", "_load_torch_export_aot_compile")
"""The methods with which TorchServe's base handler reads a model."""


def load_user_handler(manifest: Mapping[str, Any], context: HandlerContext, model: nn.Module,
                      description: HandlerDescription, first: Callable[[UserHandler], object] | None = None,
                      loaded: Callable[[nn.Module], object] = lambda own: None) -> UserHandler:
    """Create the handler that a manifest names, with `model` in place of its own model.

    Args:
        manifest: the archive's original manifest.
        context: the context that the handler sees.
        model: the model that answers in place of the handler's own model.
        description: says where the handler's own model is, and how it is loaded.
        first: lets a handler answer a request; it is called if the handler loads its model at the first request.
        loaded: receives the model that the handler has loaded, if it loads one, before `model` replaces it.

    Raises:
        ArchiveError: the handler cannot be found, or its model is not in the place where `ee-archive` found it.
    """
    handler, roots = load_entry_point(manifest["model"]["handler"])
    given = StandIn(model) if description.loading is Loading.GIVEN else None
    if given is not None:
        with given_to_loaders(handler, lambda: given):
            handler.initialize(context)
    else:
        handler.initialize(context)
        if first is not None and not _is_there(roots, description):
            first(handler)
    _replace(roots, description, model, given, loaded)
    return handler


@contextmanager
def given_to_loaders(handler: object, model: Callable[[], object]) -> Iterator[None]:
    """Give TorchServe's base handler a model, inside the block, instead of letting it read a file.

    Args:
        handler: the handler; if it has loaders of its own, they are replaced as well.
        model: returns the model that the loaders return.
    """
    def load(*args: object, **kwargs: object) -> object:
        return model()

    own = [name for name in LOADERS if hasattr(handler, name) and name not in vars(handler)]
    for name in own:
        setattr(handler, name, load)
    # A handler that is not a base handler may hold an object that is one.
    base = getattr(sys.modules.get("ts.torch_handler.base_handler"), "BaseHandler", None)
    before = {name: getattr(base, name) for name in LOADERS if hasattr(base, name)}
    for name in before:
        setattr(base, name, load)
    try:
        yield
    finally:
        for name, loader in before.items():
            setattr(base, name, loader)
        for name in own:  # what the handler loads later is not this model
            vars(handler).pop(name, None)


def _is_there(roots: Roots, description: HandlerDescription) -> bool:
    try:
        return all(at(roots, place) is not None for place in description.model)
    except LookupError:
        return False


def _replace(roots: Roots, description: HandlerDescription, model: nn.Module, given: StandIn | None,
             loaded: Callable[[nn.Module], object]) -> None:
    try:
        found = [at(roots, place) for place in description.model]
    except LookupError as error:
        raise ArchiveError(f"the handler does not keep its model in {names_of(description.model)} after initialize(), "
                           f"so it cannot be given one with early exits: {error}") from error
    original = found[0] if description.loading is Loading.KEPT else None
    has_given = isinstance(found[0], nn.Module) and any(part is given for part in found[0].modules())
    if given is None or description.is_used_as_given:
        if given is not None:
            _require_as_given(given, found[0], has_given=has_given)
        if isinstance(found[0], nn.Module) and not has_given:
            loaded(found[0])
    # A handler that was given our model has no model of its own.
    replaced = None if description.loading is Loading.GIVEN else found[0]
    stand_in = StandIn(model, original, is_fixed=True, replaced=replaced)
    for place in description.model:
        put(roots, place, stand_in)


def _require_as_given(given: StandIn, found: Any, *, has_given: bool) -> None:
    """Check that a handler calls the model that it was given, as it was given.

    What initialize() makes of a model may depend on an environment variable or on the configuration, and our model was
    exported without it. `ee-archive` then lets the handler load its own model, which a worker compares with ours.

    Raises:
        ArchiveError: the handler has set an attribute of the model, or calls a module around it.
    """
    is_other = has_given and unwrapped(found) is not given
    if given.written or is_other:
        what = f"puts a {type(found).__name__} around" if is_other else f"sets {', '.join(given.written[:3])} of"
        raise ArchiveError(f"initialize() of the handler {what} the model that it loads, which it did not do when "
                           "ee-archive exported the model: does that depend on an environment variable or on "
                           "model-config.yaml? Make the archive again, from your own one, where they are as in service")
