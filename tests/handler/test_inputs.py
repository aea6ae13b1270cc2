"""Classifiers that have several inputs, and classifiers that return more than a tensor of scores."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.export import backbone_graph, export_backbone
from early_exit.handler.backbone.graph import find_cuts, split
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.engines.registry import ENGINES
from early_exit.handler.errors import GraphError, InputError
from early_exit.handler.model.loading import build_model

TEXT = (InputSpec("tokens", (6,), "int64"), InputSpec("mask", (6,), "int64"))


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.attention(x, x, x, key_padding_mask=bias, need_weights=False)[0]


class TextClassifier(nn.Module):
    """A transformer whose blocks share one attention bias, made in place from the mask, and which averages the tokens
    that the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(5)])
        self.out = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Output:
        x = self.embedding(tokens)
        bias = torch.zeros(mask.shape[0], 6).masked_fill_(mask == 0, -1e4)
        for block in self.blocks:
            x = block(x, bias)
        pooled = (x * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return Output(self.out(pooled), features=x)


def texts(size: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (size, 6)), (torch.arange(6) < torch.randint(1, 7, (size, 1))).long()


@pytest.fixture(scope="module")
def model() -> TextClassifier:
    torch.manual_seed(0)
    return TextClassifier().eval()


@pytest.fixture(scope="module")
def backbone(model: TextClassifier) -> Backbone:
    return Backbone.from_inputs(model, TEXT)


@torch.no_grad()
def test_a_mask_travels_beside_the_tokens_and_loses_the_same_rows(model: TextClassifier, backbone: Backbone) -> None:
    stages = split(backbone.graph, [layer.node for layer in backbone.description.candidates])
    tokens, mask = texts(8)
    assert len(stages) > 2
    live: tuple[Tensor, ...] = (tokens, mask)
    rows = torch.arange(8)
    for number, stage in enumerate(stages):
        live = stage(*live)
        if number < len(stages) - 1:  # one row leaves after each stage
            assert len(live) == 2 and torch.equal(live[1], mask[rows]), "the mask itself travels, not the bias"
            live, rows = tuple(one[1:] for one in live), rows[1:]
    torch.testing.assert_close(live[0], model(tokens, mask).logits[rows])


def test_only_values_that_determine_the_answer_with_the_inputs_are_narrow_cuts(backbone: Backbone) -> None:
    inputs = {node.name for node in backbone.graph.graph.nodes if node.op == "placeholder"}
    narrow = [cut for cut in find_cuts(backbone.graph) if not cut.others]
    assert narrow and all({node.name for node in cut.inputs} <= inputs for cut in narrow)


@torch.no_grad()
def test_the_user_gets_back_the_kind_of_object_that_the_model_returned(
        model: TextClassifier, backbone: Backbone) -> None:
    served = build_model(backbone)
    tokens, mask = texts(3)
    expected = model(tokens, mask).logits
    for given in (served(tokens, mask), served(tokens, mask=mask), served(mask=mask, tokens=tokens)):
        assert type(given).__name__ == "Output"
        torch.testing.assert_close(given.logits, expected)


@pytest.mark.parametrize(("given", "named", "message"), [
    ((texts(2)[0],), {}, "expected the inputs tokens, mask"),
    (texts(2), {"labels": torch.zeros(2)}, "expected the inputs tokens, mask"),
    ((texts(2)[0], texts(3)[1]), {}, "the same number of rows of each input"),
    ((texts(2)[0], texts(2)[1].float()), {}, "expected int64 input"),
])
def test_a_call_with_other_inputs_is_the_clients_mistake(
        given: tuple[Tensor, ...], named: dict[str, Tensor], message: str, backbone: Backbone) -> None:
    with pytest.raises(InputError, match=message):
        build_model(backbone)(*given, **named)


def test_a_probe_looks_up_only_rows_that_the_tables_have(backbone: Backbone) -> None:
    tokens, mask = backbone.probe
    assert backbone.description.inputs[0].limit == 11
    assert tokens.max() < 11 and mask.eq(1).all()


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(len(x), 4)


@pytest.mark.parametrize("name", [engine.name for engine in ENGINES.values() if engine.is_exact])
@pytest.mark.parametrize("token", [11, -1, 2**31 - 1, 2**32 + 3])
@torch.no_grad()
def test_a_token_that_no_table_has_is_an_error_with_every_engine(token: int, name: str, backbone: Backbone) -> None:
    served = build_model(backbone, engine=name)
    tokens, mask = texts(4)
    served(tokens, mask)
    tokens[1, 2] = token
    with pytest.raises(IndexError, match="index out of range"):
        served(tokens, mask)


class Flags(nn.Module):
    """A model that looks up only whether a number is zero, in a table with two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(2, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.table(x.bool().long()).mean(dim=1))))


@torch.no_grad()
def test_openvino_takes_numbers_that_are_converted_to_ids_of_the_table() -> None:
    torch.manual_seed(0)
    model, x = Flags().eval(), torch.arange(20).reshape(4, 5) - 3
    served = build_model(Backbone.from_inputs(model, [InputSpec("x", (5,), "int64", 2)]), engine="openvino")
    torch.testing.assert_close(served(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_batch_that_is_counted_with_len_is_refused_with_what_to_write_instead() -> None:
    with pytest.raises(GraphError, match=r"x\.shape\[0\] instead of len\(x\)"):
        Backbone.from_module(Counting(), (4,))


class Configured(nn.Linear):
    def __init__(self, problem: str) -> None:
        super().__init__(4, 3)
        self.config = type("Config", (), {"problem_type": problem})()


@pytest.mark.parametrize(("model", "message"), [
    (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3), nn.Sigmoid()), "multi-label"),
    (Configured("multi_label_classification"), "multi_label_classification"),
    (Configured("regression"), "regression"),
])
def test_multi_label_and_regression_are_refused_with_the_reason(model: nn.Module, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Backbone.from_module(model, (4,))


def test_a_binary_classifier_with_two_scores_is_a_classifier_like_any_other() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert Backbone.from_module(model, (4,)).description.n_classes == 2


class Accumulating(nn.Module):
    """A model that writes the result of each layer into one buffer, which all later layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.zeros(x.shape[0], 8)
        for layer in self.layers:
            buffer[:, :] = layer(x + buffer).tanh()
        return self.out(buffer)


@torch.no_grad()
def test_what_is_written_in_place_is_not_lost_between_stages() -> None:
    torch.manual_seed(0)
    model = Accumulating().eval()
    graph = backbone_graph(export_backbone(model, [InputSpec("x", (8,))])[0])
    x = torch.randn(5, 8)
    cuts = find_cuts(graph)
    assert len(cuts) > 4
    for cut in cuts:
        first, second = split(graph, [cut.value.name])
        torch.testing.assert_close(second(*first(x.clone()))[0], model(x))
