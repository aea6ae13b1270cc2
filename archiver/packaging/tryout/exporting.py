"""Exports the model that a handler calls, for the inputs with which the handler calls it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from early_exit.archiver.packaging.sources.detector import backbone_of_detector, is_detector
from early_exit.archiver.packaging.tryout.adoption import CalledModel, input_specs
from early_exit.archiver.packaging.tryout.model_calls import ModelCall
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.image_class import Strategy
from early_exit.handler.backbone.program_file import load_program
from early_exit.handler.backbone.signature import InputSpec, Parameters
from early_exit.handler.errors import ArchiveError

_Inputs = Sequence[tuple[str, tuple[int, ...], str]]
"""The name, the shape of one item, and the dtype of each input."""


def exported(job: dict[str, Any], model: CalledModel, calls: Sequence[ModelCall]) -> tuple[Backbone, bool]:
    """Return a model as a backbone, and whether the calls of the model fit the backbone.

    Args:
        job: as `adopt` in `trials.py` makes it.
        model: the model to export.
        calls: the calls of the model that sample requests led to.

    Raises:
        EarlyExitError: the model cannot be exported, or the user's own samples do not fit the shape or the inputs that
            the user asked for.
    """
    shape = job["input_shape"] and tuple(job["input_shape"])
    program = job["program"] or _program_of_archive(Path(job["folder"]), model)
    if program is not None:
        backbone = _with_parameters(Backbone.from_program(load_program(Path(program))), model)
        return backbone, not calls or _fit(job, _described(input_specs(model, calls)[0], names=False),
                                           _described(backbone.description.inputs, names=False))
    if is_detector(model.exported):
        return _exported_detector(job, model, calls, shape)
    if job["strategy"] is not None:
        raise ArchiveError(f"{type(model.exported).__name__} is not a detector of torchvision, so --strategy does not "
                           "apply: leave it out")
    given = [InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in job["inputs"]]
    if calls:
        found, constants = input_specs(model, calls)
        if [spec.name for spec in given] != [spec.name for spec in found]:
            given = _of_forward(given, model, constants)
        wanted = [replace(spec, shape=shape) for spec in found] if shape is not None else given or found
        fits = _fit(job, _described(found), _described(wanted))
        return Backbone.from_inputs(model.exported, wanted, constants=constants, output=job["output"]), fits
    if given:
        return Backbone.from_inputs(model.exported, _of_forward(given, model, {}), output=job["output"]), False
    if shape is None:
        raise ArchiveError("the handler does not answer a sample image, so the model's input shape is not known: pass "
                           "--request FILE with a typical request, or --input-shape C,H,W")
    return Backbone.from_module(model.exported, shape, output=job["output"]), False


def _of_forward(given: list[InputSpec], model: CalledModel, constants: Mapping[str, Any]) -> list[InputSpec]:
    """Return the user's inputs with the names of the model's parameters.

    A single input with a name that the model does not have is the first parameter, whatever the user calls it.

    Raises:
        ArchiveError: the model has no parameters with the names of several inputs.
    """
    parameters = inspect.signature(model.exported.forward).parameters.values()
    known = [parameter.name for parameter in parameters
             if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)]
    unknown = [spec.name for spec in given if spec.name not in known]
    first = Parameters.of(model.exported.forward).name(0)
    if unknown and len(given) == 1 and not constants and first is not None:
        return [replace(given[0], name=first)]
    if unknown and len(known) == len(parameters):
        raise ArchiveError(f"the forward of {type(model.exported).__name__} takes "
                           f"{', '.join(known) or 'no arguments'}, but --input names {unknown[0]!r}: give each --input "
                           "the name of a parameter")
    return given


def images_of(call: ModelCall) -> list[Tensor]:
    """Return the (C, H, W) images that a detector is called with."""
    [value, *_] = [*call.given, *call.named.values()]
    return list(value)


def _exported_detector(job: dict[str, Any], model: CalledModel, calls: Sequence[ModelCall],
                       shape: tuple[int, ...] | None) -> tuple[Backbone, bool]:
    if job["factory"] is not None:
        raise ArchiveError("a detector can be exported only in part, and its model file is needed for the rest: give a "
                           ".mar with the model file")
    shapes = {tuple(image.shape) for call in calls for image in images_of(call)}
    shape = shape or (next(iter(shapes)) if len(shapes) == 1 else None)
    backbone = backbone_of_detector(model.exported, shape, job["strategy"] and Strategy(job["strategy"]),
                                    job["pedestrian"], job["model_file"])
    inputs = backbone.description.inputs
    return backbone, bool(shapes) and all(
        _fit(job, [(inputs[0].name, found, inputs[0].dtype)], _described(inputs)) for found in shapes)


def _fit(job: dict[str, Any], found: _Inputs, wanted: _Inputs) -> bool:
    """Tell whether samples lead to the inputs for which the model is exported.

    Raises:
        ArchiveError: the user's own samples lead to other inputs.
    """
    if list(found) == list(wanted):
        return True
    if job["own_samples"]:
        told, asked = (", ".join(f"{name} {dtype} {shape}".strip() for name, shape, dtype in inputs)
                       for inputs in (found, wanted))
        raise ArchiveError(f"the handler passes {told} to its model for the sample request, but {asked} was asked for: "
                           "leave out --input-shape and --input, or give a request that fits")
    return False


def _described(inputs: Sequence[InputSpec], *, names: bool = True) -> _Inputs:
    return [(spec.name if names else "", spec.shape, spec.dtype) for spec in inputs]


def _with_parameters(backbone: Backbone, model: CalledModel) -> Backbone:
    """Return the backbone of a program with the parameters of the model in whose place it is called.

    None is no argument for a program, which has no parameters besides its inputs. If the model does not have the inputs
    among its parameters, the parameters are not known, and a call gives its tensors to the inputs in order.
    """
    parameters = Parameters.of(model.exported.forward)
    inputs = {spec.name for spec in backbone.description.inputs}
    by_position = len(parameters.positional) == len(inspect.signature(model.exported.forward).parameters)
    known = replace(parameters, default_none=tuple(name for name in parameters.positional if name not in inputs)
                    ) if by_position and inputs <= {*parameters.positional} else None
    return replace(backbone, description=replace(backbone.description, parameters=known))


def _program_of_archive(folder: Path, model: CalledModel) -> Path | None:
    """Return the exported program in the user's archive, if the handler calls it."""
    manifest = json.loads(ArchiveLayout(folder).manifest.read_text())["model"]
    file = str(manifest.get("serializedFile"))
    is_called = isinstance(model.module, fx.GraphModule) and not manifest.get("modelFile")
    return folder / file if file.endswith(".pt2") and is_called else None
