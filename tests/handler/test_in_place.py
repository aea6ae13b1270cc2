"""Operations in place: engines that rewrite a backbone let each of them write to what it writes to in the original."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.engines.registry import ENGINES
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import laid_out_like
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import FULL
from tests.handler.test_engine import network
from tests.support.row_handlers import requests

EXACT = [engine.name for engine in ENGINES.values() if engine.is_exact]


class Between(nn.Module):
    """A convolutional network that does something between its two convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), between
        self.second, self.scores = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.norm(self.first(x)))
        return self.scores(torch.relu(self.second(x)).flatten(1))


def clipped(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that clips a part of its input in place, and returns the input."""
    def clip(x: Tensor) -> Tensor:
        view(x).clamp_(max=1.0)
        return x

    return clip


def beside(copy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that clips tokens in place, but not the maps that it copied them from, and adds both."""
    def add(x: Tensor) -> Tensor:
        tokens = copy(x.permute(0, 2, 3, 1))
        tokens.clamp_(-0.5, 0.5)
        return x + tokens.reshape(-1, 8, 8, 8).permute(0, 3, 1, 2)

    return add


def clipped_original(x: Tensor) -> Tensor:
    flat = x.view(x.shape[0], -1)
    x.clamp_(max=1.0)
    return x + flat.view(x.shape[0], 8, 8, 8)


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": clipped(lambda x: x.view(x.shape[0], -1)),
    "a slice of a view": clipped(lambda x: x.view(x.shape[0], -1)[:, :256]),
    "a part of a view": clipped(lambda x: x.view(x.shape[0], -1).chunk(2, dim=1)[0]),
    "a view of groups": clipped(lambda x: x.view(x.shape[0], 2, 4, 8, 8)[:, 0]),
    "flatten": clipped(lambda x: x.flatten(1)),
    "reshape": clipped(lambda x: x.reshape(x.shape[0], -1)),
    "contiguous": clipped(lambda x: x.contiguous()),
    "a copy by contiguous": beside(lambda x: x.contiguous()),
    "a copy by reshape": beside(lambda x: x.reshape(x.shape[0], -1, 8)),
    "a copy by flatten": beside(lambda x: x.flatten(1, 2)),
    "einsum": clipped(lambda x: torch.einsum("bchw->bhwc", x)),
    "the original of a view": clipped_original,
    "what is given by name": lambda x: (torch.clamp(x, max=1.0, out=x.flatten(1).view_as(x)), x)[1],
    "no more than the strides say": lambda x: x.as_strided((x.shape[0], 8, 8, 8), (512, 1, 64, 8)),
}


def backbone_with(between: Callable[[Tensor], Tensor]) -> Backbone:
    """Return a backbone whose probe is too small to be clipped."""
    backbone = Backbone.from_module(Between(between).eval(), (3, 8, 8))
    return backbone.probed_by((torch.full((1, 3, 8, 8), 0.1),))


def is_channels_last(model: nn.Module) -> bool:
    """Tell whether the weights of a model's convolutions of 3 x 3 are channels_last."""
    weights = [weight for weight in model.parameters() if weight.dim() == 4 and weight.shape[2] > 1 < weight.shape[1]]
    ordered = {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}
    assert len(ordered) == 1
    return ordered.pop()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", WRITES)
@torch.no_grad()
def test_a_write_reaches_what_it_reaches_in_the_original_and_nothing_else(kind: str, name: str) -> None:
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    expected = Between(WRITES[kind]).eval()(x.clone())
    served = build_model(backbone_with(WRITES[kind]), engine=name, record_layers=4)
    torch.testing.assert_close(served(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", WRITES)
@torch.no_grad()
def test_the_reference_of_a_lossy_engine_has_these_writes_too(kind: str) -> None:
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    served = build_model(backbone_with(WRITES[kind]), engine="bfloat16", sampling_rate=1.0)
    served(x)
    [batch] = served.log.take()
    torch.testing.assert_close(batch.answers.reference, Between(WRITES[kind]).eval()(x), atol=1e-4, rtol=1e-4)
    assert (batch.full_class == batch.answers.reference.argmax(dim=1)).double().mean() > 0.8


@torch.no_grad()
def test_a_model_that_writes_into_its_cast_is_refused_where_casts_return_no_copy() -> None:
    def between(x: Tensor) -> Tensor:
        low = x.half()
        low.clamp_(max=0.5)
        return x + low.float()

    backbone = backbone_with(between)
    with pytest.raises(ConfigError, match="bfloat16 computes in one dtype, .*such as ee-archive --engine folded"):
        build_model(backbone, engine="bfloat16")
    x = torch.randn(8, 3, 8, 8)
    torch.testing.assert_close(build_model(backbone)(x), Between(between).eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small", "squeezenet1_1"])
def test_ordinary_networks_stay_channels_last_though_their_relus_work_in_place(name: str) -> None:
    assert is_channels_last(build_model(network(name), record_layers=3).assembly)


@pytest.mark.parametrize("between", [
    lambda x: torch.relu_(x),
    lambda x: torch.relu_(torch.relu_(x).view(x.shape[0], -1)).view(x.shape[0], 8, 8, 8),
    lambda x: x.view(x.shape[0], 2, 4, 8, 8).transpose(1, 2).contiguous().view(x.shape[0], 8, 8, 8).relu_(),
], ids=["a ReLU", "a ReLU of a view that alone is read", "shuffled channels"])
@torch.no_grad()
def test_a_write_that_no_other_tensor_shows_costs_no_channels_last(between: Callable[[Tensor], Tensor]) -> None:
    served, x = build_model(backbone_with(between)), torch.randn(8, 3, 8, 8)
    assert is_channels_last(served.assembly)
    torch.testing.assert_close(served(x), Between(between).eval()(x), atol=1e-4, rtol=1e-4)


class Turned(nn.Module):
    """A layer that returns tokens in another order than that of their numbers in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(-1, 4, 8).transpose(1, 2)


class Residual(nn.Module):
    """A layer that clips a copy of its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens.contiguous().clamp_(-0.1, 0.1)) + tokens


def turning() -> tuple[nn.Module, Backbone, Tensor]:
    """Return a model that copies because its tokens are not contiguous, its backbone, and (12, 8) inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(Turned(), Residual(), nn.Flatten(), nn.Linear(32, 4)).eval()
    x = torch.tensor(requests(12)) * torch.linspace(0.2, 3, 12).view(-1, 1)
    return model, Backbone.from_module(model, (8,)), x


@pytest.mark.parametrize("engine", ["eager", "folded"])
@torch.no_grad()
def test_a_copy_in_the_original_stays_a_copy_when_other_rows_leave(engine: str) -> None:
    model, backbone, x = turning()
    torch.manual_seed(0)
    layer, spec = backbone.description.candidates[0], HeadSpec(pool=2, widths=())
    exits = (PlannedExit(layer.path, spec, ConfidencePolicy(1.0, 0.4), layer.cost, 0.01),)
    served = build_model(backbone, ExitPlan(backbone.description.sha256, "paper", exits, None, engine),
                         {layer.path: Head(spec, layer.shape, 4)}, engine=engine)
    found = served(x)
    stays = served.log.take()[0].answers.stages == FULL
    assert 0 < stays.sum() < len(x), "some rows must leave"
    torch.testing.assert_close(found[stays], model(x)[stays], atol=1e-4, rtol=1e-4)


def test_rows_that_are_put_together_keep_the_order_of_their_numbers_and_the_gaps_between_them() -> None:
    x = torch.arange(60.0).view(3, 4, 5)
    for source in (x.mT, x[:, 1:3], x[:, :, ::2], x.mT[:, 1:, 1:], x):
        twice = laid_out_like(source, torch.cat((source, source)))
        assert torch.equal(twice, torch.cat((source, source))) and twice.stride() == source.stride()


def test_rows_whose_numbers_overlap_in_memory_are_taken_as_they_are() -> None:
    x = torch.arange(24.0).view(2, 12).unfold(1, 4, 2)
    for source in (x, x[:1].expand(3, -1, -1), x[:, :, :1].expand(-1, -1, 4), torch.arange(21.0).view(3, 7).t()[None]):
        twice = torch.cat((source, source))
        assert torch.equal(laid_out_like(source, twice), twice)
