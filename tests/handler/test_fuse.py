"""A convolution, its bias, a sum and a ReLU become one kernel: only where that is possible, and with equal results."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.fold import fold
from early_exit.handler.engines.fuse import fuse
from early_exit.handler.engines.registry import ENGINES
from tests.support.skips import needs_gpu

ATEN = torch.ops.aten


class Odd(nn.Module):
    """A model whose sums and ReLUs may be arranged differently from those in a ResNet."""

    def __init__(self, between: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.between, self.head = between, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(self.between(x, y, self.second(y)).mean(dim=(2, 3)))


def _summed_into(view: Tensor, x: Tensor) -> Tensor:
    return torch.relu(view.add_(torch.conv2d(x, torch.ones(4, 3, 1, 1, device=x.device))))


def _after(x: Tensor, written: Tensor) -> Tensor:
    return torch.relu(x) + written


ODD: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "a sum that is written over what is read later": (lambda x, y, z: torch.relu(y.add_(z)) + y, 0),
    "a sum that is written through a view": (lambda x, y, z: _summed_into(y[:, :4], x) + y, 0),
    "a summand that is written before the ReLU": (lambda x, y, z: _after(y + z, y.mul_(2)), 0),
    "an input that is written before the ReLU": (lambda x, y, z: _after(z, y.mul_(2)), 0),
    "twice the same": (lambda x, y, z: torch.relu(z + z), 0),
    "of another shape": (lambda x, y, z: torch.relu(z + y.mean(dim=(2, 3), keepdim=True)), 0),
    "with a number": (lambda x, y, z: torch.relu(z + 1), 0),
    "scaled": (lambda x, y, z: torch.relu(torch.add(z, y, alpha=2)), 0),
    "the convolution is read twice": (lambda x, y, z: torch.relu(z) * z, 0),
    "on either side": (lambda x, y, z: torch.relu(y + z) + torch.relu(z - y), 0),
    "as usual": (lambda x, y, z: torch.relu(z + y), 1),
    "as usual, in place": (lambda x, y, z: torch.relu_(z.add_(y)), 1),
}


def folded(model: nn.Module, size: int) -> fx.GraphModule:
    [whole] = split(Backbone.from_module(model.eval(), (3, size, size)).graph, [])
    return fold(whole)


def operations(graph: fx.GraphModule) -> Counter[object]:
    return Counter(node.target for node in graph.graph.nodes if node.op == "call_function")


def test_of_a_resnet_nothing_but_convolutions_is_left_between_stem_and_head() -> None:
    found = operations(fuse(folded(torchvision.models.resnet18(weights=None), 64)))
    assert found == {ATEN.cudnn_convolution_relu.default: 9, ATEN.cudnn_convolution_add_relu.default: 8,
                     ATEN.conv2d.default: 3, ATEN.max_pool2d.default: 1, ATEN.adaptive_avg_pool2d.default: 1,
                     ATEN.flatten.using_ints: 1, ATEN.linear.default: 1}


@pytest.mark.parametrize("kind", ODD)
def test_only_what_computes_the_same_is_fused(kind: str) -> None:
    between, n_fused = ODD[kind]
    found = operations(fuse(folded(Odd(between), 8)))
    assert found[ATEN.cudnn_convolution_add_relu.default] + found[ATEN.cudnn_convolution_relu.default] == n_fused


@needs_gpu
@pytest.mark.parametrize("kind", ODD)
def test_on_a_gpu_odd_sums_give_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert_same(Odd(ODD[kind][0]), 8, tmp_path)


@needs_gpu
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "googlenet", "densenet121", "regnet_y_400mf", "vgg11"])
def test_on_a_gpu_models_give_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert_same(getattr(torchvision.models, name)(weights=None), 64, tmp_path)


def assert_same(model: nn.Module, size: int, folder: Path) -> None:
    Backbone.from_module(model.eval(), (3, size, size)).save(folder)
    backbone = load_backbone(folder, "cuda")
    x = torch.randn(5, 3, size, size, device="cuda")
    with torch.no_grad():
        [expected], [found] = (ENGINES[name].unsplit(backbone)(x) for name in ("eager", "folded"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
