"""A model is found wherever a handler's names lead to it, and its stand-in is put in the same place."""

from __future__ import annotations

import gc
import importlib
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from early_exit.handler.errors import ArchiveError
from early_exit.handler.user_handler.description import Place, Root
from early_exit.handler.user_handler.places import at, modules_reached, places_of, put
from early_exit.handler.user_handler.stand_in import StandIn


def module_with(**names: Any) -> ModuleType:
    module = ModuleType("their_handler")
    vars(module).update(names)
    return module


@pytest.mark.parametrize(("keep", "name"), [
    (lambda model: {"_service": SimpleNamespace(model=model)}, "_service.model"),
    (lambda model: {"MODEL": model}, "MODEL"),
    (lambda model: {"models": {"cats": [None, model]}}, "models['cats'][1]"),
    (lambda model: {"pipeline": SimpleNamespace(parts={"head": SimpleNamespace(net=model)})},
     "pipeline.parts['head'].net"),
    (lambda model: {"whole": nn.Sequential(nn.ReLU(), model)}, "whole.1"),
])
def test_a_model_is_found_and_replaced_wherever_it_is_kept(keep: Any, name: str) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    roots = {Root.MODULE: module_with(**keep(model))}
    [place] = places_of(roots, model)
    assert str(place) == name and at(roots, place) is model
    put(roots, place, other)
    assert at(roots, place) is other and not places_of(roots, model)


def test_a_model_is_found_in_a_class_and_in_another_file_of_the_archive(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "service_of_theirs.py").write_text("class Service:\n    model = None\n")
    (tmp_path / "handler_of_theirs.py").write_text("import os\nimport service_of_theirs as service\n")
    monkeypatch.syspath_prepend(tmp_path)
    module, model, other = importlib.import_module("handler_of_theirs"), nn.Linear(2, 2), nn.Linear(2, 2)
    module.service.Service.model = model
    [place] = places_of({Root.MODULE: module}, model)
    put({Root.MODULE: module}, place, other)
    assert str(place) == "service.Service.model" and module.service.Service.model is other


def test_all_places_of_a_model_are_found() -> None:
    model = nn.Linear(2, 2)
    roots = {Root.HANDLER: SimpleNamespace(model=model, net=model), Root.MODULE: module_with(MODEL=model)}
    assert [str(place) for place in places_of(roots, model)] == ["self.model", "self.net", "MODEL"]


def test_names_that_go_round_in_circles_end() -> None:
    loop: Any = SimpleNamespace(model=nn.Linear(2, 2))
    loop.itself, loop.more = loop, [loop, {"again": loop}]
    assert len(modules_reached({Root.HANDLER: loop})) == 1


def test_a_place_that_cannot_be_changed_is_an_error_that_names_it() -> None:
    roots = {Root.HANDLER: SimpleNamespace(models=(nn.Linear(2, 2),))}
    with pytest.raises(ArchiveError, match=r"keeps its model in self\.models\[0\], where it cannot be replaced"):
        put(roots, Place(Root.HANDLER, (("attribute", "models"), ("item", 0))), nn.Linear(2, 2))


class Original(nn.Module):
    """A user's model that has a method and attributes besides its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.config = nn.Linear(2, 2), SimpleNamespace(id2label={0: "cat"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def predict(self, x: torch.Tensor) -> int:
        return int(self(x).argmax())


def test_a_stand_in_answers_by_the_other_model_also_in_the_users_own_methods() -> None:
    other = nn.Linear(2, 2)
    with torch.no_grad():
        other.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        other.bias.copy_(torch.tensor([0.0, 5.0]))
    original = Original()
    nn.init.zeros_(original.body.weight)
    nn.init.constant_(original.body.bias, 0.0)
    stand_in = StandIn(other, original)
    assert stand_in.predict(torch.ones(1, 2)) == 1, "the user's own would say 0"
    assert stand_in.config.id2label == {0: "cat"} and stand_in.body is original.body
    assert list(stand_in.state_dict()) == [name for name, _ in stand_in.named_parameters()] == [
        "body.weight", "body.bias"], "a handler may ask for its weights by name"
    assert stand_in.get_submodule("body") is original.body and "body" in dict(stand_in.named_modules())
    assert list(StandIn(other).parameters()) == list(other.parameters())


def test_a_hook_in_the_users_model_sees_its_activations() -> None:
    original, seen = Original(), []
    stand_in = StandIn(nn.Linear(2, 2), original)
    stand_in(torch.ones(1, 2))
    original.body.register_forward_hook(lambda module, given, output: seen.append(output))
    stand_in(torch.ones(3, 2))
    assert [tuple(output.shape) for output in seen] == [(3, 2)]


def test_without_the_users_model_device_and_dtype_are_known_and_anything_else_is_named() -> None:
    stand_in = StandIn(nn.Linear(2, 2))
    assert (stand_in.device, stand_in.dtype) == (torch.device("cpu"), torch.float32)
    with pytest.raises(AttributeError, match=r"asks its model for \.config"):
        _ = stand_in.config


def test_parts_of_a_sequence_are_those_of_the_users_model_where_it_is_kept() -> None:
    original = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    stand_in = StandIn(nn.Linear(2, 2), original)
    assert stand_in[0] is original[0] and list(stand_in) == list(original) and len(stand_in) == 2
    alone = StandIn(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="asks its model for its parts"):
        _ = alone[0]
    assert alone, "'if self.model:' is asked of any model"


def test_what_a_handler_sets_on_its_model_later_is_refused_where_the_answer_may_depend_on_it() -> None:
    """The exported model would keep answering with the value that it was exported with."""
    original = Original()
    original.temperature = 1.0
    kept, let_go = (StandIn(nn.Linear(2, 2), own, is_fixed=True) for own in (original, None))
    kept.temperature, kept.last_seen = 1.0, "today"
    for stand_in in (kept.eval(), let_go.eval()):
        with pytest.raises(AttributeError, match=r"changes \.temperature of its model while it answers"):
            stand_in.temperature = 2.0


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_call_is_refused_once_a_part_of_the_users_model_is_changed(is_kept: bool) -> None:
    """The handler may keep the part from initialize() on, so earlier requests need not reveal that it changes it."""
    def scale(part: nn.Linear) -> None:
        part.scale = 2.0

    def write(part: nn.Linear) -> None:
        with torch.no_grad():
            part.weight.mul_(2)

    def learn(part: nn.Linear) -> None:
        part.train()

    for change, name in ((scale, ".body.scale"), (write, ".body.weight"), (learn, ".body is in training mode")):
        original = Original().eval()
        body = original.body
        stand_in = StandIn(nn.Linear(2, 2), original if is_kept else None, is_fixed=True, replaced=original).eval()
        del original
        gc.collect()
        body.eval()
        stand_in(torch.ones(1, 2))
        change(body)
        with pytest.raises(AttributeError, match=f"changes {name}"):
            stand_in(torch.ones(1, 2))


def test_a_model_that_is_not_kept_is_let_go() -> None:
    original = Original()
    body, weight = weakref.ref(original.body), weakref.ref(original.body.weight)
    stand_in = StandIn(nn.Linear(2, 2), is_fixed=True, replaced=original)
    del original
    gc.collect()
    assert body() is None and weight() is None
    stand_in(torch.ones(1, 2))


def test_values_that_a_kept_model_keeps_of_a_request_are_no_change() -> None:
    original = Original()
    original.body.seen = torch.zeros(1)
    stand_in = StandIn(nn.Linear(2, 2), original, is_fixed=True, replaced=original)
    original.body.register_forward_hook(lambda module, given, output: setattr(module, "seen", output))
    for _ in range(2):
        stand_in(torch.ones(1, 2))


def test_what_the_exported_model_cannot_give_is_no_clients_fault() -> None:
    with pytest.raises(AttributeError) as refused:
        _ = StandIn(nn.Linear(2, 2)).config
    assert refused.value.error_code == 500  # type: ignore[attr-defined]
    assert not hasattr(StandIn(nn.Linear(2, 2)), "config")


def test_weights_that_a_request_loads_and_training_mode_are_refused() -> None:
    """The exported model would keep answering with the weights and in the mode that it was exported with."""
    original = Original().eval()
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    with pytest.raises(AttributeError, match="changes the weights of its model while it answers"):
        stand_in.load_state_dict(original.state_dict())
    stand_in.train(False)(torch.ones(1, 2))
    with pytest.raises(AttributeError, match=r"changes \.training of its model"):
        stand_in.train()(torch.ones(1, 2))
    stand_in.eval()(torch.ones(1, 2))
    StandIn(nn.Linear(2, 2).eval()).load_state_dict({}, strict=False)  # as initialize() may do


def test_a_call_is_refused_once_a_value_in_a_configuration_of_the_users_model_is_changed() -> None:
    def of_object(model: Any) -> None:
        model.config.temperature = 5.0

    def of_dict(model: Any) -> None:
        model.settings["temperature"] = 5.0

    def of_list(model: Any) -> None:
        model.scales[1] = 5.0

    for change, name in ((of_object, r"\.config\.temperature"), (of_dict, r"\.settings\['temperature'\]"),
                         (of_list, r"\.scales\[1\]")):
        original = Original().eval()
        original.config.temperature, original.settings, original.scales = 1.0, {"temperature": 1.0}, [1.0, 1.0]
        original.body.config = original.config
        stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
        stand_in(torch.ones(1, 2))
        original.settings["cached"] = original.config.cached = 1.0
        stand_in(torch.ones(1, 2))
        change(stand_in)
        with pytest.raises(AttributeError, match=f"changes {name} of its model"):
            stand_in(torch.ones(1, 2))
