"""A call of the served model reaches the program with the arguments that it would give to the user's model."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from early_exit.archiver.packaging.tryout.adoption import CalledModel, input_specs
from early_exit.archiver.packaging.tryout.model_calls import ModelCall
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.backbone.signature import InputSpec, Parameters, bind
from early_exit.handler.errors import InputError
from early_exit.handler.model.loading import build_model

Arguments = dict[str, Any]
SPECS = (InputSpec("x", (4,)), InputSpec("mask", (4,)))
VALUES = st.sampled_from(["tensor", "none", "number"])


def model_with(parameters: list[inspect.Parameter]) -> nn.Module:
    """Return a model with these parameters, which returns the arguments that it gets, with the defaults."""
    names = ", ".join(f"{parameter.name}={parameter.name}" for parameter in parameters)
    scope: dict[str, Any] = {}
    exec(f"def forward{inspect.Signature(parameters)}: return dict({names})", scope)
    return type("Model", (nn.Module,), {"forward": staticmethod(scope["forward"])})()


@st.composite
def models(draw: st.DrawFn) -> list[inspect.Parameter]:
    """Return parameters by position or name, some with a default; then parameters by name only."""
    n_by_position, n_required = draw(st.integers(0, 4)), draw(st.integers(0, 2))
    parameters = []
    for number in range(n_by_position + draw(st.integers(0, 2))):
        by_name = number >= n_by_position
        kind = inspect.Parameter.KEYWORD_ONLY if by_name else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = draw(st.sampled_from([None, 2.0])) if by_name or number >= n_required else inspect.Parameter.empty
        parameters.append(inspect.Parameter(f"p{number}", kind, default=default))
    return parameters


@st.composite
def arguments(draw: st.DrawFn, parameters: list[inspect.Parameter]) -> Arguments:
    """Return arguments for all required parameters, and some of the others."""
    chosen = [parameter for parameter in parameters
              if parameter.default is inspect.Parameter.empty or draw(st.booleans())]
    return {parameter.name: {"tensor": torch.zeros(2, 3), "none": None, "number": 3.0}[draw(VALUES)]
            for parameter in chosen}


@st.composite
def calls(draw: st.DrawFn, parameters: list[inspect.Parameter], passed: Arguments) -> tuple[list[Any], Arguments]:
    """Return a call with these arguments: some by position, as far as none is left out before them, others by name."""
    most = 0
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.name not in passed:
            break
        most += 1
    n_given = draw(st.integers(0, most))
    names = [parameter.name for parameter in parameters]
    given = [passed[name] for name in names[:n_given]]
    return given, {name: passed[name] for name in draw(st.permutations(names[n_given:])) if name in passed}


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_call_gives_the_program_what_the_model_would_get_or_is_refused(data: st.DataObject) -> None:
    parameters = data.draw(models())
    model, sample = model_with(parameters), data.draw(arguments(parameters))
    if not any(isinstance(value, Tensor) for value in sample.values()):
        return
    given, named = data.draw(calls(parameters, sample))
    specs, constants = input_specs(CalledModel(model, ()), [ModelCall(model, tuple(given), named, False)])
    is_alike = data.draw(st.booleans())
    passed = {name: value.clone() if isinstance(value, Tensor) else value for name, value in sample.items()
              } if is_alike else data.draw(arguments(parameters))
    given, named = data.draw(calls(parameters, passed))
    try:
        bound = bind(specs, given, named, constants, Parameters.of(model.forward))
    except InputError:
        assert not is_alike, "the sample itself would be refused"
        return
    gets = model(*given, **named)
    exported = model(**dict(zip([spec.name for spec in specs], bound)), **constants)
    assert all(exported[name] is gets[name] for name in gets if isinstance(gets[name], Tensor))
    assert exported == gets


class Masked(nn.Module):
    """A model with two optional inputs of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift
        scores: Tensor = self.head(self.body(x if mask is None else x * mask))
        return scores


@pytest.fixture(scope="module")
def masked() -> Masked:
    torch.manual_seed(0)
    return Masked().eval()


@torch.no_grad()
def test_what_is_passed_after_a_none_keeps_its_place(masked: Masked) -> None:
    x, mask = torch.randn(3, 4), torch.randint(0, 2, (3, 4)).float()
    served = build_model(Backbone.from_inputs(masked, SPECS))
    torch.testing.assert_close(served(x, None, mask), masked(x, None, mask))
    torch.testing.assert_close(served(x, shift=None, mask=mask), masked(x, None, mask))
    for call in (lambda: served(x, mask), lambda: served(x, mask, None), lambda: served(x, mask, mask)):
        with pytest.raises(InputError, match="expected the inputs x, mask"):
            call()
    with pytest.raises(InputError, match="at most x, shift, mask by position"):
        served(x, None, mask, None)
    with pytest.raises(InputError, match="at most x, shift, mask by position"):
        served(x, None, mask, mask=mask)


@torch.no_grad()
def test_a_single_input_that_is_not_the_first_parameter_stays_where_it_is() -> None:
    class Second(Masked):
        def forward(self, scale: Tensor | None = None, x: Tensor | None = None) -> Tensor:  # type: ignore[override]
            assert x is not None
            return super().forward(x if scale is None else x * scale)

    model, x = Second().eval(), torch.randn(3, 4)
    [spec], constants = input_specs(CalledModel(model, ()), [ModelCall(model, (None, x), {}, False)])
    served = build_model(Backbone.from_inputs(model, [spec], constants=constants))
    torch.testing.assert_close(served(None, x), model(None, x))


def test_none_where_the_default_is_another_value_is_a_constant(masked: Masked) -> None:
    class Scaled(Masked):
        def forward(self, x: Tensor, scale: float | None = 2.0) -> Tensor:  # type: ignore[override]
            return super().forward(x if scale is None else x * scale)

    model, x = Scaled().eval(), torch.randn(3, 4)
    [spec], constants = input_specs(CalledModel(model, ()), [ModelCall(model, (x, None), {}, False)])
    assert constants == {"scale": None}
    served = build_model(Backbone.from_inputs(model, [spec], constants=constants))
    torch.testing.assert_close(served(x, None), model(x, None))
    for call in (lambda: served(x), lambda: served(x, 2.0)):
        with pytest.raises(InputError, match=r"expected {'scale': None} besides the tensors"):
            call()


@torch.no_grad()
def test_a_model_that_takes_any_arguments_by_position_is_called_by_position() -> None:
    class Rest(Masked):
        def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(*inputs)

    model, x = Rest().eval(), torch.randn(3, 4)
    [spec], constants = input_specs(CalledModel(model, ()), [ModelCall(model, (x,), {}, False)])
    served = build_model(Backbone.from_inputs(model, [spec], constants=constants))
    torch.testing.assert_close(served(x), model(x))
    with pytest.raises(InputError, match="expected the inputs inputs0"):
        served(x, x)


def test_a_description_keeps_the_parameters_and_one_without_them_can_be_read(masked: Masked, tmp_path: Path) -> None:
    description, file = Backbone.from_module(masked, (4,)).description, tmp_path / "backbone.json"
    description.save(file)
    assert description.parameters == Parameters(("x", "shift", "mask"), None, ("shift", "mask"))
    assert BackboneDescription.load(file) == description
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items()
                                if name != "parameters"}))
    assert BackboneDescription.load(file) == replace(description, parameters=None)


X, MASK = torch.zeros(3, 4), torch.ones(3, 4)


@pytest.mark.parametrize(("given", "named"), [
    ((X, MASK, 2.0), {}), ((2.0, X, MASK), {}), ((X, MASK, 2.0, None), {}), ((X,), {"scale": 2.0, "mask": MASK}),
    ((X, MASK), {"scale": 2.0, "shift": None}),
])
def test_an_archive_without_the_names_of_parameters_takes_arguments_in_order(
        given: tuple[Any, ...], named: Arguments) -> None:
    x, mask = bind(SPECS, given, named, {"scale": 2.0}, None)
    assert x is X and mask is MASK


@pytest.mark.parametrize(("given", "message"), [
    ((X, None, MASK), "does not tell which parameter .*: make the archive again with ee-archive"),
    ((X, MASK, X), "expected the inputs x, mask"), ((X, MASK, 2.0), "expected the inputs x, mask"),
])
def test_an_archive_without_the_names_of_parameters_refuses_what_may_be_wrong(
        given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bind(SPECS, given, {}, {}, None)
