"""Ordinary models whose exports have a form of their own are taken, and their stages compute what they compute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.model.loading import build_model


class Layers(nn.Module):
    """Three linear layers, and a function for what becomes of the last one's output."""

    def __init__(self, seed: int, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)
        self._end = end

    def forward(self, x: Tensor) -> Any:
        return self._end(self.last(torch.relu(self.second(torch.relu(self.first(x))))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_probabilities_are_known_in_every_precision(dtype: torch.dtype) -> None:
    ends = {ScoreKind.PROBABILITIES: lambda z: (8 * z).softmax(dim=-1),
            ScoreKind.LOG_PROBABILITIES: lambda z: (8 * z).log_softmax(dim=-1),
            ScoreKind.LOGITS: lambda z: 8 * z}
    for kind, end in ends.items():
        for seed in range(4):
            backbone = Backbone.from_module(Layers(seed, end).eval().to(dtype), (64,), dtype)
            assert backbone.description.scores is kind
            for other in torch.randn(10, 1, 64).to(dtype):
                assert backbone.probed_by((other,)).description.scores is kind


@torch.no_grad()
def test_probabilities_that_are_cast_are_known_by_the_precision_in_which_they_were_computed() -> None:
    for seed in range(4):
        model = Layers(seed, lambda z: (8 * z).bfloat16().softmax(dim=-1).float()).eval()
        backbone = Backbone.from_module(model, (64,))
        for other in torch.randn(10, 1, 64):
            assert backbone.probed_by((other,)).description.scores is ScoreKind.PROBABILITIES


class Named(NamedTuple):
    logits: Tensor
    features: Tensor | None = None


@pytest.mark.parametrize(("end", "read"), [
    (lambda z: Named(z, z.sum(dim=1)), lambda given: given.logits),
    (lambda z: OrderedDict(logits=z, features=z.sum(dim=1)), lambda given: given["logits"]),
    (lambda z: [z.sum(dim=1), z], lambda given: given[1]),
    (lambda z: {0: z, 1: z.sum(dim=1)}, lambda given: given[0]),
], ids=["named tuple", "ordered dict", "list", "dict with numbers"])
@torch.no_grad()
def test_the_output_is_of_the_models_type(end: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
    model, x = Layers(0, end).eval(), torch.randn(3, 64)
    served = build_model(Backbone.from_module(model, (64,)))(x)
    assert type(served) is type(model(x))
    torch.testing.assert_close(read(served), read(model(x)))


class Stacked(nn.Module):
    """Two recurrent layers, of which the outputs are read, and not the last states."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = kind(16, 32, batch_first=True), kind(32, 32, batch_first=True)
        self.third, self.last = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x)
        y, _ = self.second(y)
        return self.last(torch.relu(self.third(y[:, -1])))


class OfColumns(nn.Module):
    """A model of categories, whose columns share one table, with an offset for each column."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(3 * 9 + 2, 8)
        self.register_buffer("offsets", 9 * torch.arange(4))
        self.first, self.second, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(self.table(x + self.offsets).flatten(1)))
        return self.last(torch.relu(self.second(h)))


class OfMask(nn.Module):
    """A model of texts, whose positions are the sums of the mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(50, 32), nn.Embedding(8, 32)
        self.first, self.second, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.positions((mask.cumsum(dim=1) - 1).clamp(min=0))
        return self.last(torch.relu(self.second(torch.relu(self.first((h * mask[:, :, None]).mean(dim=1))))))


class OfAFloat(nn.Module):
    """A model one of whose numbers is a category."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first = nn.Embedding(3, 8), nn.Linear(20, 64)
        self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat((self.table(x[:, 0].long()), x), dim=1)
        return self.last(torch.relu(self.second(torch.relu(self.first(h)))))


def categories(n: int) -> tuple[Tensor, ...]:
    return (torch.cat((torch.randint(9, (n, 3)), torch.randint(2, (n, 1))), dim=1),)


def texts(n: int) -> tuple[Tensor, ...]:
    return torch.randint(50, (n, 8)), (torch.arange(8) < torch.randint(1, 9, (n, 1))).long()


def numbers(n: int) -> tuple[Tensor, ...]:
    return (torch.cat((torch.randint(3, (n, 1)).float(), torch.randn(n, 11)), dim=1),)


ORDINARY: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]], Callable[[int], tuple[Tensor, ...]]]] = {
    "LSTM": (lambda: Stacked(nn.LSTM), {"x": (12, 16)}, lambda n: (torch.randn(n, 12, 16),)),
    "GRU": (lambda: Stacked(nn.GRU), {"x": (12, 16)}, lambda n: (torch.randn(n, 12, 16),)),
    "columns with offsets": (OfColumns, {"x": (4,)}, categories),
    "positions from a mask": (OfMask, {"tokens": (8,), "mask": (8,)}, texts),
    "a number that is a category": (OfAFloat, {"x": (12,)}, numbers),
}
"""For each model, its inputs' shapes, and a function that makes a batch."""


@pytest.mark.parametrize("kind", ORDINARY)
@torch.no_grad()
def test_an_ordinary_model_can_be_cut(kind: str) -> None:
    make, shapes, batch = ORDINARY[kind]
    model, inputs, stay = make().eval(), batch(6), torch.tensor([1, 3])
    specs = [InputSpec(name, shape, str(value.dtype).removeprefix("torch."))
             for (name, shape), value in zip(shapes.items(), inputs)]
    backbone = Backbone.from_inputs(model, specs)
    assert backbone.description.candidates
    for layer in backbone.description.candidates:
        before, after = split(backbone.graph, [layer.node])
        torch.testing.assert_close(after(*(live[stay] for live in before(*inputs)))[0], model(*inputs)[stay])
