"""Cuts, stages and candidate layers of exported backbones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.export import backbone_graph, export_backbone
from early_exit.handler.backbone.graph import find_cuts, split
from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.errors import GraphError


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0"])
def test_the_stages_chained_are_the_backbone_for_any_number_of_rows(name: str) -> None:
    torch.manual_seed(0)
    check_stages(getattr(torchvision.models, name)(weights=None).eval())


@pytest.mark.parametrize("make", [
    lambda: torchvision.models.VisionTransformer(64, 8, 3, 2, 24, 48, num_classes=5),
    lambda: torchvision.models.DenseNet(8, (2, 3, 2), 16)], ids=["transformer", "densenet"])
def test_the_stages_chained_are_a_small_backbone_too(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    check_stages(make().eval())


@torch.no_grad()
def check_stages(model: nn.Module) -> None:
    backbone = Backbone.from_module(model, (3, 64, 64))
    stages = split(backbone.graph, [layer.node for layer in backbone.description.candidates])
    assert len(backbone.description.candidates) >= 2
    for n_rows in (1, 3):
        x = torch.randn(n_rows, 3, 64, 64)
        expected = model(x)
        live = (x,)
        for stage in stages:
            live = stage(*live)
        torch.testing.assert_close(live, (expected,), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_may_leave_between_stages() -> None:
    """Sizes computed from the batch, such as the expansion of a class token, follow the number of remaining rows."""
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=5).eval()
    backbone = Backbone.from_module(model, (3, 32, 32))
    head, *tail = split(backbone.graph, [layer.node for layer in backbone.description.candidates])
    x = torch.randn(6, 3, 32, 32)
    live = tuple(kept[[1, 4]] for kept in head(x))
    for stage in tail:
        live = stage(*live)
    torch.testing.assert_close(live, (model(x)[[1, 4]],))


class Halved(nn.Module):
    """A model whose scores are one of the two results of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(self.second(self.first(x).relu()).relu())
        scores: Tensor = torch.ops.aten.native_dropout(x, 0.5, False)[0]
        return scores


@torch.no_grad()
def test_scores_travel_alone_unless_a_detector_makes_them() -> None:
    model = Halved().eval()
    backbone = Backbone.from_module(model, (8,))
    x = torch.randn(3, 8)
    live = (x,)
    for stage in split(backbone.graph, [layer.node for layer in backbone.description.candidates]):
        live = stage(*live)
    assert len(live) == 1
    torch.testing.assert_close(live[0], model(x))


class Skipping(nn.Module):
    """A model with one skip connection around `inner` and one from the first sum around `second` and `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.second, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = a + self.inner(a)
        return self.out(self.last(self.second(b)) + b)


def test_a_value_is_a_cut_only_when_the_rest_depends_on_nothing_else() -> None:
    module = backbone_graph(export_backbone(Skipping(), [InputSpec("x", (8,))])[0])
    assert [cut.value.name for cut in find_cuts(module) if not cut.others] == ["linear", "add", "add_1", "linear_4"]


def test_resnet18_has_the_cuts_that_counting_by_hand_gives() -> None:
    program, _ = export_backbone(torchvision.models.resnet18(weights=None), [InputSpec("x", (3, 64, 64))])
    module = backbone_graph(program)
    stem, per_block, tail = 4, 2, 3  # conv, bn, relu, maxpool; sum, relu; pool, flatten, fc
    assert sum(not cut.others for cut in find_cuts(module)) == stem + 8 * per_block + tail


def test_every_component_is_a_candidate_or_is_left_out_with_a_reason() -> None:
    backbone = Backbone.from_module(torchvision.models.resnet18(weights=None), (3, 64, 64)).description
    assert [layer.path for layer in backbone.candidates] == [
        "maxpool", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0"]
    reasons = {layer.path: layer.reason for layer in backbone.left_out}
    assert reasons["conv1"] == "bn1 follows at no cost"
    assert "of the FLOPs come after it" in reasons["layer4.1"]
    costs = [layer.cost for layer in backbone.candidates]
    assert costs == sorted(costs)
    assert costs[0] > 0 and costs[-1] < 0.95


def test_a_layer_inside_a_skip_is_left_out_because_it_does_not_determine_the_answer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Skipping())
    backbone = Backbone.from_module(model, (8,)).description
    reasons = {layer.path: layer.reason for layer in backbone.left_out}
    assert reasons["2.inner"] == reasons["2.second"] == "its output alone does not determine the answer"


class Branches(nn.Module):
    """A model with two branches that meet at the end, as in a transformer with two token sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = right = x
        for to_left, to_right in zip(self.left, self.right):
            left, right = to_left(left).relu(), to_right(right).relu()
        scores: Tensor = self.out(left + right)
        return scores


@torch.no_grad()
def test_where_branches_run_beside_each_other_the_other_ones_travel_beside_the_value_that_a_head_reads() -> None:
    model = Branches().eval()
    backbone = Backbone.from_module(model, (8,))
    layers = backbone.description.candidates
    assert {"left.1", "right.1"} <= {layer.path for layer in layers}
    x = torch.randn(5, 8)
    keep, live = torch.tensor([0, 2, 3]), (x,)
    for number, stage in enumerate(split(backbone.graph, [layer.node for layer in layers])):
        live = stage(*(one[keep] if number == 1 else one for one in live))
    torch.testing.assert_close(live, (model(x)[keep],))


def test_dropout_is_left_out_as_doing_nothing_at_inference() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3))
    backbone = Backbone.from_module(model, (4,)).description
    assert {layer.path: layer.reason for layer in backbone.left_out}["1"] == "does nothing at inference"


@pytest.mark.parametrize(("tail", "kind"), [
    (nn.Identity(), ScoreKind.LOGITS), (nn.LogSoftmax(1), ScoreKind.LOG_PROBABILITIES),
    (nn.Softmax(1), ScoreKind.PROBABILITIES),
])
def test_the_kind_of_scores_is_told_from_a_forward_pass(tail: nn.Module, kind: ScoreKind) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), tail)
    assert Backbone.from_module(model, (4,)).description.scores is kind


class Shared(nn.Module):
    """A model that calls one activation module after every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.act, self.out = nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return self.out(x)


def test_a_module_that_is_called_again_is_another_candidate() -> None:
    paths = [layer.path for layer in Backbone.from_module(Shared(), (8,)).description.candidates]
    assert paths == ["act", "act@2", "act@3", "act@4"]


def test_a_program_exported_for_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3)).train()
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(model, (torch.zeros(2, 4),), dynamic_shapes=(batch,))
    with pytest.raises(GraphError, match=r"model\.eval\(\) before exporting"):
        Backbone.from_program(program)


def test_a_program_for_one_batch_size_is_refused() -> None:
    program = torch.export.export(nn.Linear(4, 3).eval(), (torch.zeros(1, 4),))
    with pytest.raises(GraphError, match="batches of exactly 1"):
        Backbone.from_program(program)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("model", "message"), [
    (DataDependent(), r"stops in forward \(test_graph.py:\d+\) at 'return x if x.sum\(\) > 0 else -x'"),
    (nn.Linear(4, 1), "at least 2 classes"),
    (nn.Conv2d(4, 3, 1), "is this a classifier"),
    (nn.Softmax(1), "no convolution, matrix product or attention"),
    (nn.Linear(4, 3), "no layer of this backbone can carry an exit"),
])
def test_what_cannot_carry_exits_is_refused_with_the_reason(model: nn.Module, message: str) -> None:
    shape = (4, 6, 6) if isinstance(model, nn.Conv2d) else (4,)
    with pytest.raises(GraphError, match=message):
        Backbone.from_module(model, shape)


@torch.no_grad()
def test_a_saved_backbone_comes_back_the_same(tmp_path: Path) -> None:
    backbone = Backbone.from_module(Skipping(), (8,))
    backbone.save(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.description == backbone.description
    x = torch.randn(5, 8)
    assert torch.equal(loaded.graph(x), backbone.graph(x))
    assert Backbone.from_program(loaded.program).description.sha256 == backbone.description.sha256


def test_other_weights_have_another_identity() -> None:
    model = Skipping()
    before = Backbone.from_module(model, (8,)).description.sha256
    with torch.no_grad():
        model.last.bias[0] += 1e-6
    assert Backbone.from_module(model, (8,)).description.sha256 != before


def test_a_layer_that_is_called_full_is_not_taken_for_the_full_model() -> None:
    class Part(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full, self.more, self.last = Part(8), Part(16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.last(self.more(self.full(x)))
            return scores

    paths = [layer.path for layer in Backbone.from_module(Named().eval(), (8,)).description.candidates]
    assert "full@1" in paths and "full" not in paths
