"""A backbone is refused whose scores depend on more than a row and fixed weights, however rarely or little."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import GraphError, Unsupported

SHAPE = (3, 8, 8)
Step = Callable[[nn.Module, Tensor], Tensor]


class WithStep(nn.Module):
    """A classifier of images that does something with its input or with an activation."""

    seen: Tensor

    def __init__(self, step: Step, *, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._step, self._first = step, first
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.last = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self._step(self, x) if self._first else x)
        scores: Tensor = self.last((x if self._first else self._step(self, x)).mean(dim=(2, 3)))
        return scores


def attend(dropout: float) -> Step:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        seen = functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=dropout)
        return x + 0.01 * seen.transpose(1, 2).reshape(x.shape)

    return step


def with_scores(model: WithStep, x: Tensor) -> Tensor:
    scores: Tensor = Backbone.from_module(model, SHAPE).graph(x)
    return scores


@pytest.mark.parametrize("step", [
    lambda model, x: torch.where(x.amax() > 10, x / 255, x),
    lambda model, x: torch.where((x > 10).any(dim=0, keepdim=True), x / 255, x),
    lambda model, x: torch.cond(x.mean() > 10, lambda y: y / 255, lambda y: y + 0.0, (x,)),
    lambda model, x: x - x.new_zeros(()).add_(x.mean()).clamp_min(10),
], ids=["scale", "scale of a pixel", "branch", "in place"])
def test_a_value_of_the_whole_batch_is_found_though_no_probe_shows_it(step: Step) -> None:
    with pytest.raises(GraphError, match="one value from all rows of a batch .*compute it for each row"):
        Backbone.from_module(WithStep(step, first=True).eval(), SHAPE)


@pytest.mark.parametrize("step", [
    lambda model, x: x + 1e-5 * torch.randn_like(x), lambda model, x: functional.rrelu(x, training=True), attend(0.1)],
    ids=["noise", "rrelu", "attention"])
def test_a_model_that_draws_at_random_is_refused_however_little_it_changes(step: Step) -> None:
    with pytest.raises(GraphError, match="draws at random") as refused:
        Backbone.from_module(WithStep(step).eval(), SHAPE)
    assert refused.value.unsupported is Unsupported.CHANGES


def test_a_model_that_keeps_something_of_its_requests_is_refused() -> None:
    def centre(model: nn.Module, x: Tensor) -> Tensor:
        seen: Tensor = model.seen.mul_(0.999).add_(1e-6 * x.mean(dim=(0, 2, 3)))  # type: ignore[operator, union-attr]
        return x - seen[None, :, None, None]

    with pytest.raises(GraphError, match="writes into .*seen while it answers") as refused:
        Backbone.from_module(WithStep(centre).eval(), SHAPE)
    assert refused.value.unsupported is Unsupported.CHANGES


@pytest.mark.parametrize("step", [
    attend(0.0), lambda model, x: functional.rrelu(x, training=False),
    lambda model, x: functional.dropout(x, 0.5, False),
    lambda model, x: torch.where(x.amax(dim=(1, 2, 3), keepdim=True) > 1, x / 2, x),
    lambda model, x: x * x.new_ones(8, 1, 1).cumsum(dim=0), lambda model, x: x + x.new_zeros(()),
    lambda model, x: x.clone().relu_()],
    ids=["attention", "rrelu", "dropout", "of each row", "new tensor", "new number", "in place"])
def test_operations_that_only_look_like_these_are_exported(step: Step) -> None:
    model, x = WithStep(step).eval(), torch.randn(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(with_scores(model, x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [
    lambda model, x: x if x.shape[0] == 1 else x - 1, lambda model, x: x * 2 if x.shape[0] > 1 else x])
def test_a_model_that_treats_a_single_row_differently_is_refused_without_a_request_that_shows_it(step: Step) -> None:
    """torch.export takes the number of rows for more than one."""
    with pytest.raises(GraphError, match="treats a batch of one differently"):
        Backbone.from_module(WithStep(step).eval(), SHAPE)
