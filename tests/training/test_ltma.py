"""LTMA, the memory that a request allocates, is compared with counts by hand, and rows leave where a script says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.backbone.export import backbone_graph, export_backbone
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.training.report.ltma import expected_ltma, ltma
from early_exit.training.report.scripted_model import ScriptedModel
from tests.support.residual import residual_backbone

FLOAT = 4
WIDTH, N_CLASSES = 16, 4
RESIDUAL = 5 * WIDTH * FLOAT
"""The bytes that a residual block allocates for one row: linear, tanh, linear, scaled, sum."""


@pytest.fixture(scope="module")
def scripted() -> ScriptedModel:
    backbone = residual_backbone()
    return scripted_of(backbone, [backbone.description.candidates[0], backbone.description.candidates[2]])


def scripted_of(backbone: Backbone, layers: list[CandidateLayer]) -> ScriptedModel:
    spec = HeadSpec(pool=None, widths=())
    plan = ExitPlan(backbone.description.sha256, "paper", tuple(
        PlannedExit(layer.path, spec, ConfidencePolicy(1.0, 0.5), cost=layer.cost, head_cost=0.01)
        for layer in layers), None)
    heads = {planned.layer: Head(spec, (WIDTH,), N_CLASSES) for planned in plan.exits}
    return ScriptedModel(backbone, plan, heads)


def test_each_tensor_of_a_graph_counts_once() -> None:
    backbone = residual_backbone()
    by_hand = WIDTH * FLOAT + 6 * RESIDUAL + N_CLASSES * FLOAT
    assert ltma(backbone.graph, (torch.zeros(1, WIDTH),)) == by_hand
    assert ltma(backbone.graph, (torch.zeros(7, WIDTH),)) == 7 * by_hand


def test_views_and_results_in_place_allocate_nothing() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            copied = x.reshape(2, 8).t().contiguous()  # one allocation of 64 bytes
            return copied.relu_().flatten()[:4] + 1  # another one of 16

    assert ltma(Views(), (torch.zeros(16),)) == 64 + 64 + 16


def test_convolutions_allocate_their_outputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    graph = backbone_graph(export_backbone(model, [InputSpec("x", (3, 8, 8))])[0])
    maps = 3 * 8 * 8 * 8  # of convolution, batch norm and activation
    assert ltma(graph, (torch.zeros(1, 3, 8, 8),)) == FLOAT * (3 * 8 * 8 + maps + 8 + 5)


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=12))
@settings(max_examples=30)
def test_rows_leave_where_the_script_says(scripted: ScriptedModel, exits: list[int]) -> None:
    with torch.no_grad():
        answers = scripted(*scripted.script(torch.tensor(exits)))
    assert answers.stages.tolist() == exits
    assert answers.outputs.shape == (len(exits), N_CLASSES)


def test_a_request_that_leaves_early_allocates_what_came_before_its_exit(scripted: ScriptedModel) -> None:
    taken = [ltma(scripted, scripted.script(torch.tensor([exit_]))) for exit_ in (0, 1, -1)]
    plain = WIDTH * FLOAT + 6 * RESIDUAL + N_CLASSES * FLOAT
    # The decisions and the bookkeeping take a few more numbers per row.
    assert WIDTH * FLOAT + RESIDUAL < taken[0] < taken[1] < taken[2]
    assert plain < taken[2] < 1.6 * plain
    share = torch.tensor([0, 0, 1, -1])
    assert expected_ltma(scripted, share) == pytest.approx((2 * taken[0] + taken[1] + taken[2]) / 4)
