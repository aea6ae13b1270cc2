"""The profile: measured times decide how many rows must be answered before a batch is made smaller."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.exits.head import Convolution, Head, HeadSpec
from early_exit.handler.exits.inference_head import InferenceHead
from early_exit.training.costs.profiling import Profile, profile_backbone

SIZES = (1, 2, 4, 8)
IN_PROPORTION = (1.0, 2.0, 4.0, 8.0)
ONE_PRICE = (1.0, 1.0, 1.0, 1.0)


def measured(stages: tuple[tuple[float, ...], ...], shrinks: tuple[tuple[float, ...], ...]) -> Profile:
    return Profile("folded", "cpu", ("a", "b"), SIZES, stages, shrinks)


@pytest.mark.parametrize(("after", "copying", "least"), [
    (IN_PROPORTION, (0.0, 0.1, 0.2, 0.4), 1),  # copying a row costs a tenth of the work on it
    (IN_PROPORTION, (1.0, 2.0, 4.0, 8.0), 6),  # 2 for each of the 8 - n rows that stay, against 1 for each of n
    (ONE_PRICE, (0.0, 0.1, 0.2, 0.4), 8),  # the stage costs the same for any number of rows
])
def test_rows_leave_where_what_follows_saves_more_than_the_copy_costs(
        after: tuple[float, ...], copying: tuple[float, ...], least: int) -> None:
    profile = measured((IN_PROPORTION, after, after), (copying, copying))
    assert profile.shrink_from(["a", "b"], 8) == (least, least)


def test_only_what_comes_before_the_next_exit_counts() -> None:
    profile = measured((IN_PROPORTION, ONE_PRICE, IN_PROPORTION), ((0.0, 0.1, 0.2, 0.4),) * 2)
    assert profile.shrink_from(["a", "b"], 8) == (8, 1)
    assert profile.shrink_from(["a"], 8) == (1,)


@pytest.mark.parametrize("engine", ["folded", "eager"])
def test_every_stage_and_copy_is_timed_on_the_engine_that_serves(engine: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone.from_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                                                  nn.Flatten(), nn.Linear(8 * 144, 5)), (3, 16, 16))
    layers = backbone.description.candidates
    profile = profile_backbone(backbone, layers, engine=engine, sizes=(1, 4))
    assert profile.engine == engine
    assert len(profile.stages) == len(layers) + 1 and len(profile.shrinks) == len(layers)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in profile.stages)


def test_a_head_that_is_moved_to_be_measured_leaves_the_trained_one_where_it_is() -> None:
    head = Head(HeadSpec(convolutions=(Convolution(3, 1, 5),), widths=(7,)), (3, 8, 8), 4).eval()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    moved = InferenceHead(head, 1.0).to("meta")
    assert {tensor.device.type for tensor in moved.state_dict().values()} == {"meta"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    assert torch.isfinite(head(torch.randn(2, 3, 8, 8))).all()
