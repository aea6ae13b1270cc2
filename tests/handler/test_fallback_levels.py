"""A model moves to a safer fallback level without a restart, and bypasses exits that cost more than they save."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.config import ServingConfig
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.exits.risk import Risk
from early_exit.handler.inference.bypass import AdaptiveBypass, Comparison
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import watch
from early_exit.handler.protocol import EXIT_HEADER, FULL, STEP_HEADER
from tests.support.host import MemoryHost, calls_of_rows, worker_of


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(*(nn.Linear(8, 8), nn.ReLU()) * 3, nn.Linear(8, 3)), (8,))


@pytest.fixture
def plan(backbone: Backbone) -> ExitPlan:
    exits = tuple(PlannedExit(layer.path, HeadSpec(widths=()), ConfidencePolicy(1.0, 0.0), layer.cost, 0.01)
                  for layer in backbone.description.candidates[:2])
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1500, 19, 0.0127, 0.03, "fixed-sequence", (1.0, 2.0))
    return ExitPlan(backbone.description.sha256, "certified", exits, certificate, safer=((0.42, 0.42), (2.0, 0.0)))


def served(backbone: Backbone, plan: ExitPlan, **options: float) -> EarlyExitModel:
    torch.manual_seed(1)
    heads = {exit_.layer: Head(exit_.head, backbone.description.layer(exit_.layer).shape, 3) for exit_ in plan.exits}
    return build_model(backbone, plan, heads, **options)


def test_each_step_uses_its_own_thresholds_and_the_last_is_the_backbone(backbone: Backbone, plan: ExitPlan) -> None:
    model = served(backbone, plan)
    batch = 5 * torch.randn(64, 8)
    taken = []
    for level in range(len(model.assembly.levels)):
        model.fall_back(level)
        model(batch)
        (answered,) = model.log.take()
        assert answered.level == level
        taken.append(answered.answers.stages)
    assert set(taken[0].tolist()) == {0}, "everybody leaves at threshold 0"
    assert len(set(taken[1].tolist())) > 1
    assert set(taken[2].tolist()) == {1}, "the first exit never lets anyone leave"
    assert set(taken[3].tolist()) == {FULL}
    torch.testing.assert_close(model(batch), backbone.graph(batch))


def test_a_model_that_has_given_up_its_exits_is_sampled_like_one_without(backbone: Backbone, plan: ExitPlan) -> None:
    model = served(backbone, plan, sampling_rate=0.0, sampling_rate_in_full=1.0)
    model.fall_back(1)
    model(torch.randn(4, 8))
    model.fall_back(3)
    model(torch.randn(4, 8))
    assert [len(one.answers.shadow) for one in model.log.take()] == [0, 4]


def test_exits_that_are_always_wrong_are_fallen_back_from_while_serving(backbone: Backbone, plan: ExitPlan,
                                                                        tmp_path: Path) -> None:
    """The whole path in a worker: losses of shadow rows, the state in the records folder, the header and the level."""
    model = served(backbone, plan, sampling_rate=1.0)
    worker = worker_of(model, config=ServingConfig(records=str(tmp_path)), host=MemoryHost("model", "2.0"))
    calls = calls_of_rows([torch.randn(64, 8)], [f"request-{row}" for row in range(64)])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and model.level < model.assembly.last_level:
        worker.step(calls)
        time.sleep(0.02)
    assert model.level == model.assembly.last_level == 3
    reply = worker.step(calls)[0]
    assert reply is not None and reply.headers[EXIT_HEADER] == "full" and reply.headers[STEP_HEADER] == "3 of 3"
    worker.close()
    folder = tmp_path / "model" / backbone.description.sha256
    restarted = watch(plan, folder, "2.0")
    assert restarted is not None and restarted.state.step == 3
    restarted.close()
    other_plan = watch(replace(plan, expected_cost=0.5), folder, "2.0")
    assert other_plan is not None and other_plan.state == MonitorState(), "another plan begins anew"
    other_plan.close()


def test_a_plan_without_certificate_promises_nothing_that_could_be_watched(plan: ExitPlan) -> None:
    assert watch(replace(plan, certificate=None), None, "2.0") is None
    assert watch(replace(plan, exits=(), safer=()), None, "2.0") is None
    assert watch(None, None, "2.0") is None


def run_batches(exits_s: float, backbone_s: float, count: int, *,
                benefit: AdaptiveBypass | None = None) -> AdaptiveBypass:
    noise = random.Random(0)
    benefit = benefit or AdaptiveBypass(0.1, noise.random)
    for _ in range(count):
        takes_exits = benefit.takes_exits(8)
        benefit.measured(8, (exits_s if takes_exits else backbone_s) * noise.lognormvariate(0, 0.3),
                         with_exits=takes_exits)
    return benefit


def test_exits_that_cost_more_than_they_save_are_bypassed_and_taken_again_once_they_pay() -> None:
    benefit = run_batches(1.2, 1.0, 6000)
    assert benefit.bypassed() == {8: True}
    assert run_batches(0.7, 1.0, 6000, benefit=benefit).bypassed() == {8: False}


def test_exits_that_pay_are_kept() -> None:
    assert run_batches(0.8, 1.0, 20_000).bypassed() == {8: False}


def test_exits_that_save_much_but_seldom_are_kept() -> None:
    """Most batches are slower with exits, because the exit heads take time, but the mean time decides."""
    noise = random.Random(1)
    benefit = AdaptiveBypass(0.1, noise.random)
    for _ in range(20_000):
        takes_exits = benefit.takes_exits(1)
        seconds = (1.1 if noise.random() < 0.6 else 0.3) if takes_exits else 1.0
        benefit.measured(1, seconds * noise.lognormvariate(0, 0.1), with_exits=takes_exits)
    assert benefit.bypassed() == {1: False}


def test_where_both_cost_the_same_few_tests_ever_reject() -> None:
    noise = random.Random(2)
    rejected = 0
    for _ in range(200):
        test = Comparison()
        for _ in range(300):
            test.add(noise.lognormvariate(0, 0.5), noise.lognormvariate(0, 0.5))
            if test.rejected:
                rejected += 1
                break
    assert rejected <= 6, "1 % of 200, and some luck"


@given(sizes=st.lists(st.integers(1, 40), max_size=60))
def test_without_control_every_batch_takes_the_exits(sizes: list[int]) -> None:
    benefit = AdaptiveBypass(0.0, random.Random(0).random)
    for size in sizes:
        assert benefit.takes_exits(size)
        benefit.measured(size, 1.0, with_exits=True)
    assert not any(benefit.bypassed().values())


def test_the_shadow_sample_is_drawn_at_its_rate_whether_a_row_leaves_early_or_not(backbone: Backbone,
                                                                                  plan: ExitPlan) -> None:
    first = replace(plan.exits[0], policy=ConfidencePolicy(1.0, 0.4))
    model = served(backbone, replace(plan, exits=(first, plan.exits[1])), sampling_rate=0.1)
    for _ in range(40):
        model(5 * torch.randn(1000, 8))
    batches = model.log.take()
    stages = torch.cat([one.answers.stages for one in batches])
    drawn = torch.cat([torch.zeros(1000, dtype=torch.bool).index_fill(0, one.answers.shadow, True) for one in batches])
    for stage in stages.unique():
        count = int((stages == stage).sum())
        assert count > 1000
        assert drawn[stages == stage].double().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / count) ** 0.5)


def test_two_workers_do_not_draw_the_same_sample(backbone: Backbone, plan: ExitPlan) -> None:
    batch = torch.randn(500, 8)
    drawn = []
    for _ in range(2):
        model = served(backbone, plan, sampling_rate=0.5)
        model(batch)
        drawn.append(model.log.take()[0].answers.shadow.tolist())
    assert drawn[0] != drawn[1]


def test_being_drawn_changes_no_answer(backbone: Backbone, plan: ExitPlan) -> None:
    batch = 5 * torch.randn(100, 8)
    torch.testing.assert_close(served(backbone, plan, sampling_rate=1.0)(batch), served(backbone, plan)(batch))
