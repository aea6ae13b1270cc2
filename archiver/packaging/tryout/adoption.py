"""Finds the model that a loaded handler calls, the model's inputs, and what prevents its export."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.archiver.packaging.tryout.model_calls import ModelCall, n_parameters
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.export import unwrapped
from early_exit.handler.backbone.signature import InputSpec, Parameters
from early_exit.handler.errors import ArchiveError, GraphError, Unsupported
from early_exit.handler.user_handler.description import Place, Root
from early_exit.handler.user_handler.model_state import ModelState
from early_exit.handler.user_handler.places import Roots, at, modules_reached, places_of

_SMALL = 0.05
"""The share of the largest model's parameters below which a module counts as pre- or post-processing."""
_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""Modules that answer differently each time in training mode."""


@dataclass(frozen=True)
class CalledModel:
    """The model of a handler."""

    module: nn.Module
    """The module that is called."""
    places: tuple[Place, ...]
    """The places where the handler keeps the module."""

    @property
    def exported(self) -> nn.Module:
        """The module without wrappers that compile it or spread it over devices."""
        return unwrapped(self.module)

    def calls(self, calls: Sequence[ModelCall]) -> list[ModelCall]:
        """Return the calls of this model among other calls."""
        return [call for call in calls if call.module is self.module]


def called_model(calls: Sequence[ModelCall], roots: Roots) -> CalledModel:
    """Return the model that answers a handler's requests.

    Args:
        calls: the calls of modules that a sample request led to.
        roots: the objects at which the handler's names begin.

    Raises:
        ArchiveError: there is no such model, or there are several.
    """
    sizes = {call.module: n_parameters(call.module) for call in calls}
    if any(isinstance(module, torch.jit.ScriptModule) for module in sizes):
        raise _torchscript()
    largest = max(sizes.values(), default=0)
    if not largest:
        for module in sizes:
            _require_unpacked(module)
        raise _no_module(roots)
    # A part of a model that is also called by itself, for an embedding say, is not another model.
    parts = {part for module in sizes for part in module.modules() if part is not module}
    models = [module for module, size in sizes.items() if size >= _SMALL * largest and module not in parts]
    if len(models) > 1:
        names = ", ".join(type(module).__name__ for module in models)
        whole = next((module for _, module in modules_reached(roots) if set(models) <= set(module.modules())), None)
        if whole is not None:
            raise ArchiveError(f"the handler calls parts of its {type(whole).__name__} by themselves, {names}, so no "
                               "single call returns the scores: let it call the whole model, with self.model(x)",
                               Unsupported.SEVERAL_SCORES)
        raise ArchiveError(f"the handler calls {len(models)} models for a request, {names}, but an exit can replace "
                           "the answer of one only: put them into one module that returns the scores",
                           Unsupported.SEVERAL_SCORES)
    last = _last_layer(calls, models[0])
    if last is not None:
        raise ArchiveError(f"the handler passes the output of its {type(models[0]).__name__} to a "
                           f"{type(last).__name__}, which computes the scores, but an exit can replace scores only: "
                           "put both into one module that returns the scores", Unsupported.SEVERAL_SCORES)
    return _with_places(models[0], roots)


def _last_layer(calls: Sequence[ModelCall], model: nn.Module) -> nn.Module | None:
    """Return a module with a weight matrix that is called with the model's output; None if there is none."""
    widths: frozenset[int] = frozenset()
    for call in calls:
        given = [value for value in (*call.given, *call.named.values()) if isinstance(value, Tensor) and value.dim()]
        if call.module is model:
            widths = frozenset(shape[-1] for shape in call.returned)
        elif any(value.shape[-1] in widths for value in given) and any(
                parameter.dim() > 1 for parameter in call.module.parameters()):
            return call.module
    return None


def held_model(roots: Roots) -> CalledModel:
    """Return the model of a handler for which no request is known: the one in `self.model`, or the only one it has.

    Raises:
        ArchiveError: it is not clear which model the handler calls.
    """
    reached = {module: n_parameters(module) for _, module in modules_reached(roots)}
    try:
        usual = at(roots, Place(Root.HANDLER, (("attribute", "model"),)))
    except LookupError:
        usual = None
    models = [usual] if usual in reached else [module for module, size in reached.items() if size]
    if any(isinstance(module, torch.jit.ScriptModule) for module in models):
        raise _torchscript()
    if not models:
        raise _no_module(roots)
    if len(models) > 1:
        raise ArchiveError(f"the handler has {len(models)} models, "
                           f"{', '.join(type(module).__name__ for module in models)}: a sample request shows which of "
                           "them it calls, so pass --request FILE")
    return _with_places(models[0], roots)


def input_specs(model: CalledModel, calls: Sequence[ModelCall]) -> tuple[list[InputSpec], dict[str, Any]]:
    """Return the arguments of a model: tensors with a row for each item, and values that are always the same.

    Args:
        model: the model.
        calls: the calls of the model, for different requests.

    Raises:
        ArchiveError: the model gets something else, or tensors whose sizes differ from request to request.
    """
    bound = [_arguments(model, call) for call in calls]
    tensors = [[(name, tuple(value.shape[1:]), str(value.dtype).removeprefix("torch."))
                for name, value in arguments.items() if isinstance(value, Tensor)] for arguments in bound]
    constants = [{name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
                 for arguments in bound]
    kind = type(model.exported).__name__
    for arguments, call in zip(bound, calls):
        given = {name: tuple(value.shape) for name, value in arguments.items() if isinstance(value, Tensor)}
        n_rows = next((shape[0] for shape in given.values() if shape), 0)
        # For a single row, a model may squeeze the first dimension away.
        if n_rows > 1 and call.returned and all(len(shape) == 1 and shape[0] != n_rows for shape in call.returned):
            raise ArchiveError(f"the handler calls {kind} without a batch dimension: {given} gives {call.returned[0]}, "
                               "and an exit takes (batch, ...) tensors: let the handler call self.model(x[None]) and "
                               "take the first row of the result")
    for name, value in constants[0].items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ArchiveError(f"expected the handler to pass tensors to {kind}, found {type(value).__name__} for "
                               f"{name!r}")
    if any(other != constants[0] for other in constants):
        raise ArchiveError(f"the handler calls {kind} with settings that differ from request to request, {constants}, "
                           "so it is another model each time", Unsupported.CHANGES)
    if not tensors[0]:
        raise ArchiveError(f"expected the handler to pass tensors to {kind}, found none")
    if any(other != tensors[0] for other in tensors):
        sizes = " and ".join(", ".join(f"{name} {shape}" for name, shape, _ in found) for found in tensors[:2])
        raise ArchiveError(f"the handler passes inputs of different sizes to {kind}, {sizes}, so a sample does not "
                           "show the model's input shape: pass --input-shape C,H,W if all requests come at one size, "
                           "or bring them to one size in the handler")
    return [InputSpec(*found) for found in tensors[0]], constants[0]


def probed(backbone: Backbone, model: CalledModel, calls: Sequence[ModelCall]) -> Backbone:
    """Return a backbone whose probe is the first row of a real call, if a call has the backbone's inputs.

    Args:
        backbone: the exported model.
        model: the model.
        calls: the calls of the model.

    Raises:
        ArchiveError: the scores of the probe are NaN or all infinite, so it could not tell damaged weights from sound
            ones.
    """
    for call in calls[:1]:
        rows = tuple(value[:1].detach().cpu().clone() for value in _arguments(model, call).values()
                     if isinstance(value, Tensor))
        if [(row.shape[1:], str(row.dtype)) for row in rows] == [
                (spec.shape, f"torch.{spec.dtype}") for spec in backbone.description.inputs]:
            backbone = backbone.probed_by(rows)
    scores = torch.tensor(backbone.description.probe)
    if not bool(scores.isfinite().any()) or bool(scores.isnan().any()):
        tried = "for the sample request" if calls else "on any input that was tried"
        raise ArchiveError(f"the model's scores {tried} are not numbers, {scores.tolist()[:5]}, so damaged weights "
                           "could not be told from sound ones: pass --request FILE with a typical request")
    return backbone


def require_fixed(model: CalledModel, calls: Sequence[ModelCall]) -> None:
    """Check that a model answers equal requests alike.

    Raises:
        ArchiveError: the model is in training mode, in which it draws at random or continues to learn.
    """
    if any(call.is_training for call in calls):
        random = [name for name, part in model.exported.named_modules() if part.training and isinstance(part, _RANDOM)]
        if random:
            raise ArchiveError("the handler calls its model in training mode, in which parts of it answer differently "
                               f"each time ({', '.join(random[:3])}): call self.model.eval() in initialize()",
                               Unsupported.CHANGES)


def require_same(before: ModelState, calls: Sequence[ModelCall]) -> None:
    """Check that requests have not changed a model.

    Args:
        before: the model after its first answer.
        calls: the calls of the model.

    Raises:
        ArchiveError: requests have changed the model, even if only during a call; the message names the parts.
    """
    changed = sorted({name for call in calls for name in call.changed} | set(before.changes()))
    if changed:
        raise ArchiveError(f"the handler changes its model while it answers ({', '.join(changed[:3])}), so "
                           "there is no single model to export: let initialize() make it, once", Unsupported.CHANGES)


def _arguments(model: CalledModel, call: ModelCall) -> dict[str, Any]:
    """Return the arguments of a call by parameter name, without None where it means no argument."""
    try:
        bound = inspect.signature(model.exported.forward).bind(*call.given, **call.named)
    except TypeError as error:
        raise ArchiveError(f"the handler calls {type(model.exported).__name__} with arguments that it does not take: "
                           f"{error}") from error
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= {f"{name}{index}": one for index, one in enumerate(value)}
        else:
            arguments[name] = value
    return Parameters.of(model.exported.forward).without_none(arguments)


def _with_places(module: nn.Module, roots: Roots) -> CalledModel:
    places = places_of(roots, module)
    if not places:
        raise ArchiveError(f"the handler calls a {type(module).__name__} that neither its attributes nor its module's "
                           "names reach, so it cannot be replaced: keep it in self.model", Unsupported.NO_MODULE)
    model = CalledModel(module, places)
    _require_unpacked(model.exported)
    return model


def _require_unpacked(module: nn.Module) -> None:
    """Check that no part of a module keeps its weights where torch.export does not see them.

    Raises:
        GraphError: a part does.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) or "quantized" in type(part).__module__:
            raise GraphError(f"{name or 'the model'} is packed by TorchScript, as quantize_dynamic does, and "
                             "torch.export needs the eager model: let ee-archive quantize it, with --engine "
                             "openvino-int8", Unsupported.TORCHSCRIPT)


def _torchscript() -> ArchiveError:
    return ArchiveError("the handler calls a TorchScript model, and torch.export needs the eager model: archive it "
                        "with --model-file and its state dict, or give 'package.module:function' with --weights, or "
                        "an exported .pt2", Unsupported.TORCHSCRIPT)


def _no_module(roots: Roots) -> ArchiveError:
    """Return the error of a handler whose model is not a torch module, with the kind of the model if it is known."""
    try:
        model = at(roots, Place(Root.HANDLER, (("attribute", "model"),)))
    except LookupError:
        model = None
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if model is None or isinstance(model, nn.Module):
        return ArchiveError("no torch.nn.Module with weights answers the handler's requests, and only such a module "
                            "can be exported. A method that the handler keeps, as in self.predict = "
                            "self.model.forward, hides its model: let the handler call self.model",
                            Unsupported.NO_MODULE)
    if "InferenceSession" in kind or "tensorrt" in kind.lower():
        return ArchiveError(f"the handler's model is a session ({kind}), and torch.export needs the eager model that "
                            "it was made from", Unsupported.SESSION)
    if "aot" in kind.lower() or getattr(model, "__name__", "") == "optimized" or "_export" in kind:
        return ArchiveError(f"the handler's model is a compiled library ({kind}), and torch.export needs the eager "
                            "model that it was made from", Unsupported.AOT_LIBRARY)
    return ArchiveError(f"the handler's model is a {kind}, expected a torch.nn.Module", Unsupported.NO_MODULE)
