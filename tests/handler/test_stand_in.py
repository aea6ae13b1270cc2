"""The stand-in of a handler's model: hooks, and ways through the parts, of which some requests may make use."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from early_exit.handler.user_handler.stand_in import StandIn
from tests.handler.test_places import Original


class WritingIntoItsInput(nn.Module):
    """Like `Original`, but it scales its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x.mul_(2))


def test_a_hook_that_only_some_requests_have_may_change_activations() -> None:
    """An exported model has no hooks, so the answer is that of the user's own model."""
    original = Original().eval()
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    x = torch.ones(1, 2)
    for register in (original.body.register_forward_hook, original.body.register_forward_pre_hook):
        exported = stand_in(x)
        hook = register(lambda module, *values: 3 * values[-1] if torch.is_tensor(values[-1]) else (3 * values[-1][0],))
        assert torch.equal(stand_in(x), original(x)) and not torch.equal(original(x), exported)
        hook.remove()
        assert torch.equal(stand_in(x), exported)


def test_a_hook_that_was_exported_and_is_removed_leaves_the_answer_to_the_users_model() -> None:
    original = Original().eval()
    hook = original.body.register_forward_hook(lambda module, given, output: 3 * output)
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    x = torch.ones(1, 2)
    assert torch.equal(stand_in(x), stand_in.answering(x)), "the exported model does what the hook does"
    hook.remove()
    assert torch.equal(stand_in(x), original(x))


def test_a_new_hook_in_a_part_of_a_model_that_is_not_kept_is_refused() -> None:
    original = Original().eval()
    body = original.body
    body.register_forward_hook(lambda module, given, output: None)
    stand_in = StandIn(nn.Linear(2, 2).eval(), is_fixed=True, replaced=original)
    stand_in(torch.ones(1, 2))
    body.register_forward_hook(lambda module, given, output: 3 * output)
    with pytest.raises(AttributeError, match="changes the hooks of its model"):
        stand_in(torch.ones(1, 2))
    del original, body
    gc.collect()
    stand_in(torch.ones(1, 2))


def test_a_model_with_hooks_that_writes_into_its_input_does_not_change_the_answer() -> None:
    original = WritingIntoItsInput().eval()
    original.body.register_forward_hook(lambda module, given, output: None)
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    expected = stand_in.answering(torch.ones(1, 2))
    assert torch.equal(stand_in(torch.ones(1, 2)), expected)


def test_whatever_way_a_handler_goes_through_the_parts_of_its_model_they_are_the_users() -> None:
    """Parts of the exported model would do: nothing of what a handler looks for is in it, and nothing would be said."""
    original = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    assert [*stand_in.children()] == [*original.children()] and [*stand_in.modules()] == [*original.modules()]
    alone = StandIn(nn.Linear(2, 2), is_fixed=True)
    for ask in (lambda: [*alone.children()], lambda: [*alone.modules()], lambda: alone.apply(print)):
        with pytest.raises(AttributeError, match="asks its model for its parts"):
            ask()
    assert alone.train().answering.training and not alone.eval().answering.training
    assert alone.double().answering.weight.dtype is torch.float64, "it is converted and moved as before"
    StandIn(nn.Linear(2, 2)).apply(lambda module: None)  # as initialize() may do


class Scaled(nn.Module):
    """A model that computes with settings in many places."""

    of_class = 1.0
    filler = float("nan")

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.cfg = {"head": {"scales": [1.0]}}
        self.space = SimpleNamespace(head=SimpleNamespace(scale=1.0))
        self.masks = {"cats": torch.ones(2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) * self.of_class * self.cfg["head"]["scales"][0] * self.space.head.scale
                * self.masks["cats"] * global_settings["scale"])


global_settings: dict[str, Any] = {"scale": 1.0}


@pytest.mark.parametrize(("change", "name"), [
    (lambda model: model.cfg["head"]["scales"].__setitem__(0, 5.0), r"\.cfg\['head'\]\['scales'\]\[0\]"),
    (lambda model: setattr(model.space.head, "scale", 5.0), r"\.space\.head\.scale"),
    (lambda model: model.masks["cats"].fill_(5.0), r"\.masks\['cats'\]"),
    (lambda model: setattr(Scaled, "of_class", 5.0), r"\.Scaled\.of_class"),
    (lambda model: global_settings.update(scale=5.0), r"\.tests\.handler\.test_stand_in\.global_settings\['scale'\]"),
])
def test_a_call_is_refused_once_a_setting_that_the_model_reads_is_changed_wherever_it_is(
        change: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "of_class", 1.0)
    monkeypatch.setitem(global_settings, "scale", 1.0)
    original = Scaled().eval()
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    original.cfg["head"]["cached"] = global_settings["cached"] = [1.0]
    stand_in(torch.ones(1, 2))
    change(stand_in)
    with pytest.raises(AttributeError, match=f"changes {name} of its model"):
        stand_in(torch.ones(1, 2))


def test_dropout_that_a_request_switches_on_is_refused() -> None:
    """As an estimate of uncertainty needs it: every answer would be the same."""
    original = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    stand_in.apply(lambda module: module.train() if isinstance(module, nn.Dropout) else None)
    with pytest.raises(AttributeError, match=r"changes \.1 is in training mode of its model"):
        stand_in(torch.ones(1, 2))


class OfNoLength(Original):
    """Like a compiled module whose parts cannot be counted."""

    def __len__(self) -> int:
        raise TypeError("does not support len()")


class Empty(Original):
    """A model that is a container of its own kind, with nothing in it."""

    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize("kind", [OfNoLength, Empty])
def test_the_length_of_a_model_makes_no_difference(kind: type[Original]) -> None:
    original, x = kind().eval(), torch.ones(1, 2)
    stand_in = StandIn(nn.Linear(2, 2).eval(), original, is_fixed=True, replaced=original)
    assert not any(parameter.requires_grad for parameter in original.parameters())
    assert torch.equal(stand_in(x), stand_in.answering(x))
    original.body.register_forward_hook(lambda module, given, output: 3 * output)
    assert torch.equal(stand_in(x), original(x))
