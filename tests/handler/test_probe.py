"""A backbone whose answer to a row depends on the other rows of the batch is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import GraphError


class OverTheBatch(nn.Module):
    """A classifier that computes something over the rows of a batch in the middle."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.last = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(self.function(self.first(x)))
        return scores


def centred(x: Tensor) -> Tensor:
    return x - 0.5 * x.mean(dim=0)


def shared(x: Tensor) -> Tensor:
    return x.softmax(dim=0) * x


def scaled(x: Tensor) -> Tensor:
    return x / (1 + x.abs().amax())


def between_least_and_most(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


class OfItsInput(nn.Module):
    """A classifier that computes something over a whole batch of images before anything else."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.body(self.function(x))
        return scores


class OfItsTokens(nn.Module):
    """A classifier of texts whose scores depend on the mean token of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.last(self.table(tokens).mean(dim=1) * (1 + tokens.double().mean()).float())
        return scores


@pytest.mark.parametrize("function", [
    lambda x: x / x.abs().max(), between_least_and_most, standardised,
    lambda x: (x - x.mean(dim=(0, 2, 3), keepdim=True)) / x.std(dim=(0, 2, 3), keepdim=True)],
    ids=["most", "least and most", "whole batch", "by channel"])
def test_a_statistic_of_the_values_of_a_batch_that_no_order_changes_is_refused(
        function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(GraphError, match="if another row is in the batch"):
        Backbone.from_module(OfItsInput(function).eval(), (3, 8, 8))


def test_a_statistic_of_the_integers_of_a_batch_is_refused() -> None:
    with pytest.raises(GraphError, match="if another row is in the batch"):
        Backbone.from_module(OfItsTokens().eval(), (6,), torch.int64)


@pytest.mark.parametrize("function", [centred, shared, scaled])
def test_a_model_that_computes_over_the_rows_of_a_batch_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(GraphError, match="if another row is in the batch"):
        Backbone.from_module(OverTheBatch(function).eval(), (4,))


def test_batch_statistics_are_refused_also_after_their_operation_was_decomposed() -> None:
    model = OverTheBatch(nn.BatchNorm1d(8, track_running_stats=False)).eval()
    program = torch.export.export(model, (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with pytest.raises(GraphError, match=re.escape("answers must not depend on the batch")):
        Backbone.from_program(program.run_decompositions())


@pytest.mark.parametrize("function", [torch.tanh, nn.LayerNorm(8), nn.BatchNorm1d(8)])
def test_a_model_that_treats_rows_one_by_one_is_accepted(function: Callable[[Tensor], Tensor]) -> None:
    assert Backbone.from_module(OverTheBatch(function).eval(), (4,)).description.n_classes == 3
