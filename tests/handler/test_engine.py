"""Engines: the answers are those of the plain backbone, whichever engine runs the stages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.export import backbone_graph, export_backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.engines.fold import fold
from early_exit.handler.engines.registry import ENGINES
from early_exit.handler.inference.forward import Stage, run_with_exits
from early_exit.handler.model.loading import build_model
from tests.support.plans import random_exits


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms statistics as if trained. A fresh one is the identity, so folding it would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0),
                                      (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


@cache
def network(name: str) -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(with_statistics(getattr(torchvision.models, name)(weights=None)), (3, 64, 64))


def operations(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small"])
@torch.no_grad()
def test_the_default_engine_gives_the_plain_backbones_answers(name: str) -> None:
    backbone = network(name)
    served = build_model(backbone, record_layers=100)
    for n_rows in (1, 3):
        x = torch.randn(n_rows, 3, 64, 64)
        torch.testing.assert_close(served(x), backbone.graph(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_engine_eager_gives_them_bit_for_bit() -> None:
    backbone = network("resnet18")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(build_model(backbone, engine="eager", record_layers=100)(x), backbone.graph(x))


class Adding(nn.Module):
    """A model with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scores = nn.Linear(192, 32), nn.Linear(192, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scores(torch.relu(self.first(x.flatten(1)) - self.second(y.flatten(1))))


@pytest.mark.parametrize("name", [engine.name for engine in ENGINES.values() if engine.is_exact])
@torch.no_grad()
def test_inputs_in_any_memory_layout_are_read_as_they_are(name: str) -> None:
    """A handler that turns pictures from HWC to CHW passes a permuted view."""
    torch.manual_seed(0)
    model = Adding().eval()
    served = build_model(Backbone.from_inputs(model, [InputSpec("x", (3, 8, 8)), InputSpec("y", (3, 8, 8))]),
                         engine=name)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: torch.stack((x, x), dim=-1)[..., 0], lambda x: x[:, :, :1].expand_as(x), lambda x: x.mT]
    for number in range(40):
        x, y = (layouts[number % 4](torch.randn(1 + number % 9, 3, 8, 8)) for _ in range(2))
        assert not x[0].is_contiguous()
        torch.testing.assert_close(served(x, y), model(x, y), atol=1e-4, rtol=1e-4)


class MaskedAtTheEnd(nn.Module):
    """A model whose mask passes all its layers and is read after them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(4)))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.layers(x) * mask.float())


@pytest.mark.parametrize("dtype", ["int64", "int32", "float32", "bool", "uint8"])
@pytest.mark.parametrize("name", [engine.name for engine in ENGINES.values() if engine.is_exact])
@torch.no_grad()
def test_an_input_that_passes_stages_unchanged_reaches_the_last_and_is_not_written_into(name: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = MaskedAtTheEnd().eval()
    backbone = Backbone.from_inputs(model, [InputSpec("x", (6,)), InputSpec("mask", (6,), dtype)])
    served = build_model(backbone, engine=name, record_layers=100)
    assert len(served.assembly.stages) > 3
    for n_rows in (1, 3, 8):
        x, mask = torch.randn(n_rows, 6), (torch.arange(6 * n_rows).view(n_rows, 6) % 2).to(getattr(torch, dtype))
        for own in (mask, torch.ones_like(mask)):
            before = own.clone()
            torch.testing.assert_close(served(x, own), model(x, own), atol=1e-4, rtol=1e-4)
            assert torch.equal(own, before)


def test_no_batch_norm_of_a_resnet_is_left_and_the_weights_are_there_once() -> None:
    backbone = network("resnet18")
    served = build_model(backbone, record_layers=100)
    left = [name for part in served.assembly._parts for name in operations(part) if "batch_norm" in name]
    assert not left
    size = sum(tensor.numel() for tensor in served.parameters())
    assert 0.99 < size / sum(tensor.numel() for tensor in backbone.graph.parameters()) < 1


class ReadTwice(nn.Module):
    """A model in which the second convolution feeds both a batch norm and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x))
        y = self.second(x)
        return (self.norms[1](y) + y).mean(dim=(2, 3))


@torch.no_grad()
def test_a_convolution_that_is_read_twice_keeps_its_weights() -> None:
    module = backbone_graph(export_backbone(with_statistics(ReadTwice()), [InputSpec("x", (3, 8, 8))])[0])
    folded = fold(module)
    assert [name for name in operations(folded) if "batch_norm" in name] == ["aten.batch_norm.default"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), module(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cut_between_convolution_and_batch_norm_leaves_both_as_they_are() -> None:
    module = backbone_graph(export_backbone(with_statistics(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))),
        [InputSpec("x", (3, 8, 8))])[0])
    x = torch.randn(2, 3, 8, 8)
    first, second = (fold(stage) for stage in split(module, ["conv2d"]))
    torch.testing.assert_close(first(x), split(module, ["conv2d"])[0](x))
    torch.testing.assert_close(second(*first(x))[0], module(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(groups=st.sampled_from([1, 2]), bias=st.booleans(), affine=st.booleans(), dilation=st.integers(1, 2),
       padding=st.sampled_from([0, 1, "same"]), eps=st.sampled_from([1e-5, 1e-2]), dims=st.integers(1, 3))
@torch.no_grad()
def test_folding_is_exact_for_any_convolution(groups: int, bias: bool, affine: bool, dilation: int, padding: int | str,
                                              eps: float, dims: int) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = with_statistics(nn.Sequential(
        convolution(2, 4, 3, padding=padding, dilation=dilation, groups=groups, bias=bias),
        norm(4, eps=eps, affine=affine), nn.ReLU())).double()
    x = torch.randn(2, 2, *[7] * dims, dtype=torch.float64)
    module = torch.export.export(model, (x,)).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    folded = fold(module)
    assert not [name for name in operations(folded) if "batch_norm" in name]
    torch.testing.assert_close(folded(x), model(x))


class Viewing(nn.Module):
    """A model that reshapes a feature map with view(), like ShuffleNet and many hand-written models."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        x = x.view(x.shape[0], 2, 2, 8, 8).transpose(1, 2).contiguous().view(x.shape[0], 4, 8, 8)
        return self.classifier(x.view(x.shape[0], -1))


@torch.no_grad()
def test_views_of_channels_last_maps_are_as_they_were() -> None:
    module = backbone_graph(export_backbone(Viewing().eval(), [InputSpec("x", (3, 8, 8))])[0])
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fold(module)(x), module(x), atol=1e-5, rtol=1e-5)


def varied_inputs() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 3, 64, 64, generator=generator) * torch.linspace(0.2, 3, 8).view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", [engine.name for engine in ENGINES.values() if not engine.needs_calibration])
@torch.no_grad()
def test_an_items_answer_does_not_depend_on_its_batch(name: str) -> None:
    backbone = network("resnet18")
    plan, heads = random_exits(backbone, name)
    served = build_model(backbone, plan, heads, engine=name)
    batch = varied_inputs()
    together = served(batch)
    stages = served.log.take()[0].answers.stages
    assert len(set(stages.tolist())) > 2, "rows must leave at several exits"
    alone = torch.cat([served(row[None]) for row in batch])
    taken = torch.cat([one.answers.stages for one in served.log.take()])
    assert torch.equal(taken, stages)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_activations_stay_channels_last_when_rows_leave() -> None:
    backbone = network("resnet18")
    plan, heads = random_exits(backbone)
    seen: list[Tensor] = []

    def watched(stage: Stage) -> Stage:
        return Stage(lambda x: (seen.append(x), stage.forward(x))[1], stage.exit)

    first, *others = build_model(backbone, plan, heads).assembly.stages
    run_with_exits((varied_inputs(),), [first, *map(watched, others)])
    assert len({len(x) for x in seen}) > 1, "rows must leave"
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
