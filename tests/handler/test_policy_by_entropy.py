"""An exit policy is added in one place: a policy registered here gets a plan, which is written, read and served."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import PlanError
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan, build_heads, load_plan, save_plan
from early_exit.handler.exits.policy import POLICIES, ConfidencePolicy
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import FULL
from tests.support.entropy import EntropyPolicy
from tests.support.plans import random_exits

BATCH = 4 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, EntropyPolicy.kind, EntropyPolicy)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return Backbone.from_module(nn.Sequential(*layers, nn.Linear(8, 3)), (8,))


def plan_by_entropy(backbone: Backbone) -> tuple[ExitPlan, dict[str, Head]]:
    plan, heads = random_exits(backbone)
    exits = tuple(replace(planned, policy=EntropyPolicy(0.1, 0.6, scale=1.0)) for planned in plan.exits)
    return replace(plan, exits=exits, safer=((0.95,) * len(exits),)), heads


def expected_stages(backbone: Backbone, layers: tuple[str, ...], heads: dict[str, Head], threshold: float) -> Tensor:
    """Return the stage at which each row should leave, by the entropy that torch.distributions computes."""
    by_node = {}

    class Kept(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            by_node[n.name] = super().run_node(n)
            return by_node[n.name]

    with torch.no_grad():
        Kept(backbone.graph).run(BATCH)
        stages = torch.full((len(BATCH),), FULL)
        for number, path in reversed(list(enumerate(layers))):
            logits = heads[path](by_node[backbone.description.layer(path).node]) / 0.1
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            stages[1 - entropy / math.log(3) >= threshold] = number
    return stages


@pytest.mark.usefixtures("registered")
def test_a_plan_by_a_policy_that_registers_itself_is_read_and_served(backbone: Backbone, tmp_path: Path) -> None:
    plan, heads = plan_by_entropy(backbone)
    plan = save_plan(tmp_path, plan, heads)
    loaded, tensors = load_plan(tmp_path / "plan.json")
    assert loaded == plan and loaded.digest() == plan.digest()
    model = build_model(backbone, loaded, build_heads(loaded, tensors, backbone.description))
    for level, threshold in enumerate((0.6, 0.95)):
        model.fall_back(level)
        model(BATCH)
        stages = model.log.take()[0].answers.stages
        expected = expected_stages(backbone, model.assembly.layers, heads, threshold)
        assert (stages == expected).double().mean() > 0.99, "but for rounding at the threshold"
        assert len(stages.unique()) > 1, "rows must leave in several places"
    by_confidence = replace(plan, exits=tuple(replace(planned, policy=ConfidencePolicy(0.1, 0.6))
                                              for planned in plan.exits))
    other = build_model(backbone, by_confidence, heads)
    other(BATCH)
    stages = other.log.take()[0].answers.stages
    assert not torch.equal(stages, expected_stages(backbone, other.assembly.layers, heads, 0.6))


def test_a_policy_decides_on_a_heads_answers_what_it_decides_on_its_logits() -> None:
    logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    for policy in (ConfidencePolicy(0.5, 0.7), EntropyPolicy(0.5, 0.5, scale=1.2)):
        answers = policy.answers(logits)
        assert torch.equal(policy(logits), policy.on_answers()(answers))
        assert 0 < policy(logits).double().mean() < 1
        torch.testing.assert_close(policy.error_chance(logits), 1 - answers.softmax(dim=1).max(dim=1).values)


@pytest.mark.usefixtures("registered")
def test_a_policy_without_its_values_is_refused(backbone: Backbone) -> None:
    data = json.loads(json.dumps(plan_by_entropy(backbone)[0].to_json()))
    assert data["exits"][0]["policy"] == {"kind": "entropy", "scale": 1.0}
    del data["exits"][0]["policy"]["scale"]
    with pytest.raises(PlanError, match="expected scale, temperature, threshold of a policy by entropy"):
        ExitPlan.from_json(data, "plan.json")


def test_a_policy_that_this_version_does_not_know_is_refused_by_name(backbone: Backbone) -> None:
    data = plan_by_entropy(backbone)[0].to_json()
    with pytest.raises(PlanError, match="expected one of the policies confidence, found 'entropy'"):
        ExitPlan.from_json(data, "plan.json")


def test_a_plan_by_confidence_is_written_as_it_always_was(backbone: Backbone) -> None:
    [planned, *_] = random_exits(backbone)[0].to_json()["exits"]
    assert list(planned) == ["layer", "head", "temperature", "threshold", "cost", "head_cost", "shrink_from"]
    assert (planned["temperature"], planned["threshold"]) == (0.1, 0.55)
