"""Unusual forward methods are exported with unchanged answers, and the probe notices damage to any of the weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.backbone.scores import ScoreKind, score_error
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.errors import ArchiveError, GraphError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.model.loading import build_model
from early_exit.handler.model.probe import answer_probe
from tests.support.damage import unnoticed_damage
from tests.support.forwards import HalfPrecisionScores, Plain, forwards
from tests.support.zoo import Specimen

FORWARDS = pytest.mark.parametrize("specimen", list(forwards()), ids=lambda specimen: specimen.name)


@FORWARDS
@torch.no_grad()
def test_a_habit_of_forward_is_cut_inside_and_answers_as_the_model(specimen: Specimen, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = specimen.make().eval()
    specimen.export(model).save(tmp_path)
    backbone = load_backbone(tmp_path)
    layers = [layer.path for layer in backbone.description.candidates]
    assert layers == ["body.1", "body.3"], "autocast or no_grad hides nothing"
    stages = split(backbone.graph, [layer.node for layer in backbone.description.candidates])
    served = build_model(backbone)
    for size in (1, 3, 40):
        inputs = specimen.batch(size)
        expected = specimen.scores(model, inputs).reshape(size, -1)  # squeezing one row leaves a vector
        live: tuple[Tensor, ...] = tuple(inputs.values())
        for stage in stages:
            live = stage(*live)
        torch.testing.assert_close(live[0], expected.float(), atol=1e-4, rtol=1e-4)
        answer = specimen.scores(served, inputs)
        assert answer.dtype == expected.dtype
        torch.testing.assert_close(answer, expected, atol=1e-2 if expected.dtype is torch.bfloat16 else 1e-4, rtol=1e-4)


@FORWARDS
def test_the_probe_notices_damage_to_any_weights(specimen: Specimen, tmp_path: Path) -> None:
    torch.manual_seed(0)
    specimen.export(specimen.make().eval()).save(tmp_path)
    backbone = load_backbone(tmp_path)
    assert answer_probe(build_model(backbone))["probe"] == "ok"
    assert not list(unnoticed_damage(backbone, build_model(backbone).assembly.max_probe_error))
    for weights in backbone.graph.parameters():
        if weights.dim() > 1:
            weights.data.neg_()
            with pytest.raises(ArchiveError, match="weights are damaged"):
                answer_probe(build_model(backbone))
            weights.data.neg_()


@torch.no_grad()
def test_exits_within_autocast_answer_and_their_scores_have_the_models_dtype() -> None:
    torch.manual_seed(0)
    backbone = Backbone.from_module(HalfPrecisionScores().eval(), (3, 8, 8))
    layer, spec = backbone.description.candidates[0], HeadSpec(pool=2, widths=())
    exit_ = PlannedExit(layer.path, spec, ConfidencePolicy(1.0, 0.0), layer.cost, 0.01)
    model = build_model(backbone, ExitPlan(backbone.description.sha256, "paper", (exit_,), None),
                        {layer.path: Head(spec, layer.shape, 5).eval()}, record_layers=2, sampling_rate=1.0)
    assert model(torch.randn(4, 3, 8, 8)).dtype is torch.bfloat16
    served = model.log.take()[0]
    assert (served.answers.stages == 0).all()
    assert served.answers.outputs.dtype is torch.float32


class OfTheBatch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.batch_norm(x, None, None, training=True))


class SometimesDropped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.dropout(self.body(x).flatten(1), 0.5, training=True))


@pytest.mark.parametrize("model", [OfTheBatch, SometimesDropped])
def test_statistics_of_the_batch_and_chance_are_refused(model: type[nn.Module]) -> None:
    with pytest.raises(GraphError, match="as in training.*training=self.training"):
        Backbone.from_module(model().eval(), (3, 8, 8))


class OneRowIsAnother(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(dim=1).reshape(-1, 1).squeeze(1)


def test_scores_without_classes_are_refused() -> None:
    with pytest.raises(GraphError, match="expected scores of shape"):
        Backbone.from_module(OneRowIsAnother().eval(), (3, 8, 8))


def error(found: list[float], expected: list[float], kind: ScoreKind = ScoreKind.LOGITS) -> float:
    return score_error(torch.tensor(found), torch.tensor(expected), kind)


def test_scores_are_compared_on_the_scale_of_those_that_can_answer() -> None:
    assert error([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0
    assert error([1.0, 2.0, 3.3], [1.0, 2.0, 3.0]) == pytest.approx(0.1)
    for filler in (-1e9, -1e4, -math.inf, torch.finfo(torch.float32).min):
        assert error([1.0, filler, 3.3], [1.0, filler, 3.0]) == pytest.approx(0.1), filler
        assert error([1.0, filler, 3.0], [1.0, filler, 3.0]) == 0
    for mask in (-50.0, -100.0):
        assert error([1.0, mask, 3.3], [1.0, mask, 3.0]) == pytest.approx(0.1), "it is the same to the last bit"
        assert error([1.0, mask * 1.1, 3.0], [1.0, mask, 3.0]) == pytest.approx(0.1), "it may be an answer"
    assert error([0.0, 0.1], [0.0, 0.0]) == pytest.approx(0.1), "scores of zero have no scale"


def test_a_masked_probability_of_nothing_hides_no_damage() -> None:
    found, expected = (torch.tensor([*scores, -math.inf]).softmax(0).tolist() for scores in ((1.0, 1.004), (1.0, 1.0)))
    assert error(found, expected, ScoreKind.PROBABILITIES) > 1e-3
    assert error(expected, expected, ScoreKind.PROBABILITIES) == 0
    assert error([1.0, 0.0], [1 - 1e-7, 0.0], ScoreKind.PROBABILITIES) < 1e-6, "a sure answer's rounding is no damage"


def test_scores_that_are_no_numbers_must_be_where_they_are_expected() -> None:
    assert error([1.0, -math.inf], [-math.inf, 1.0]) == math.inf
    assert error([1.0, math.nan], [1.0, 2.0]) == math.inf
    assert error([1.0, math.inf], [1.0, -math.inf]) == math.inf
    assert error([1.0, 2.0], [1.0, math.nan]) == math.inf
    assert error([1.0, math.nan], [1.0, math.nan]) == 0
    assert error([math.nan] * 2, [math.nan] * 2) == math.inf, "nothing is left to compare"


def test_probabilities_of_a_sure_answer_are_compared_as_logarithms() -> None:
    sure, surer = [1 - 1e-6, 1e-6], [1 - 1e-9, 1e-9]
    assert error(surer, sure, ScoreKind.PROBABILITIES) > 0.1 > error(surer, sure)
