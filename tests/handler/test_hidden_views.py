"""Operations that return a view although their schemas do not tell so, or that look as if they did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.backbone.signature import InputSpec

HIDDEN_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "three dimensions": torch.atleast_3d,
    "three dimensions, of a list": lambda h: torch.atleast_3d(2 * h, h)[1],
    "chunks": lambda h: torch.unsafe_chunk(h, 1, dim=1)[0][:, :, None],
    "broadcast": lambda h: torch.broadcast_tensors(2 * h, h)[1][:, :, None],
    "the type of another": lambda h: h.type_as(2 * h)[:, :, None],
    "the size of another": lambda h: h.sum_to_size(h.shape)[:, :, None],
    "the product of one": lambda h: torch.cartesian_prod(h.flatten()).view(h.shape)[:, :, None],
    "conjugates of real numbers": lambda h: torch.conj_physical(h)[:, :, None],
}
"""Views of (B, F) activations, as (B, F, 1), by operations whose schemas do not tell that they are views."""


class WritesIntoView(nn.Module):
    """A model that writes into a view of an activation which a later layer reads."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.last, self._view = nn.Linear(64, 4), view

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        view = self._view(h)
        z = self.second(h)
        view.add_(1)
        return self.last(self.third(z + h)) + view.reshape(x.shape[0], -1).mean(dim=1, keepdim=True)


class WritesIntoViewed(WritesIntoView):
    """A model that writes into an activation of which a later layer reads a view."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        part = h[:, :32]
        view = self._view(h).flatten(1)
        z = self.second(view)
        part.mul_(3)
        return self.last(torch.relu(self.third(torch.relu(z))) + view)


@pytest.mark.parametrize("writes", [WritesIntoView, WritesIntoViewed])
@pytest.mark.parametrize("kind", HIDDEN_VIEWS)
@torch.no_grad()
def test_a_write_into_a_view_that_no_schema_tells_of_reaches_the_rows_that_stay(
        kind: str, writes: type[WritesIntoView]) -> None:
    model = writes(HIDDEN_VIEWS[kind]).eval()
    backbone, x = Backbone.from_module(model, (64,)), torch.randn(6, 64)
    expected, stay = model(x.clone()), torch.tensor([1, 3])
    assert backbone.description.candidates
    for layer in backbone.description.candidates:
        before, after = split(backbone.graph, [layer.node])
        torch.testing.assert_close(after(*(live[stay] for live in before(x.clone())))[0], expected[stay])


OF_SEVERAL: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "einsum, the weight first": lambda model, h: torch.einsum("ed,bd->be", model.weight, h),
    "einsum, the weight last, and a write into its result":
        lambda model, h: torch.einsum("bd,ed->be", h, model.weight).relu_(),
    "einsum of weights alone": lambda model, h: h + torch.einsum("i,i->i", model.weight[0], model.scale),
    "a weight broadcast to the rows": lambda model, h: torch.mul(*torch.broadcast_tensors(model.scale, h)),
    "a mesh of a weight and a buffer":
        lambda model, h: h + torch.stack(torch.meshgrid(model.scale, model.shift, indexing="ij")).sum(dim=(0, 1)),
}
"""Operations on several tensors that return no view of a weight into which something is written."""


class OfSeveral(nn.Module):
    """A model whose second layer is an operation on an activation and weights."""

    def __init__(self, second: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.third, self.fourth = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 4)
        self.weight, self.scale = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))
        self.register_buffer("shift", torch.randn(64))
        self._second = second

    def forward(self, x: Tensor) -> Tensor:
        h = self._second(self, torch.relu(self.first(x)))
        return self.last(torch.relu(self.fourth(torch.relu(self.third(h)))))


@pytest.mark.parametrize("kind", OF_SEVERAL)
@torch.no_grad()
def test_a_model_that_writes_into_no_weight_can_be_cut_wherever_its_rows_are_separate(kind: str) -> None:
    model = OfSeveral(OF_SEVERAL[kind]).eval()
    backbone, x = Backbone.from_module(model, (64,)), torch.randn(6, 64)
    assert {"first", "third"} <= {layer.path for layer in backbone.description.candidates}
    for layer in backbone.description.candidates:
        before, after = split(backbone.graph, [layer.node])
        torch.testing.assert_close(after(*before(x.clone()))[0], model(x))


@torch.no_grad()
def test_an_input_that_is_written_into_through_a_view_of_several_stays_as_it_was() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            one, other = torch.broadcast_tensors(x, y)
            one *= -3
            return self.last(torch.relu(self.first(one + other)))

    inputs = [InputSpec(name, (64,), "float32") for name in "xy"]
    backbone, x, y = Backbone.from_inputs(Broadcast().eval(), inputs), torch.randn(6, 64), torch.randn(6, 64)
    expected, before = Broadcast().eval()(x.clone(), y.clone()), (x.clone(), y.clone())
    torch.testing.assert_close(backbone.graph(x, y), expected)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
