"""Plans and exit heads are loaded as they were saved, and only for their own backbone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import PlanError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import (
    Certificate,
    ExitPlan,
    PlannedExit,
    build_heads,
    load_plan,
    save_plan,
    write_plan,
)
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.exits.risk import Risk


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return Backbone.from_module(nn.Sequential(*layers, nn.Linear(8, 3)), (8,))


def plan_for(backbone: Backbone) -> tuple[ExitPlan, dict[str, Head]]:
    layers = backbone.description.candidates[:2]
    heads = {layer.path: Head(HeadSpec(widths=(5,)), layer.shape, 3) for layer in layers}
    exits = tuple(PlannedExit(layer.path, HeadSpec(widths=(5,)), ConfidencePolicy(1.5, 0.9), layer.cost, 0.01)
                  for layer in layers)
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1500, 19, 0.0127, 0.03, "fixed-sequence", (1.0, 2.0))
    return ExitPlan(backbone.description.sha256, "certified", exits, certificate, safer=((0.95, 0.95),)), heads


def test_a_plan_is_read_as_it_was_saved(backbone: Backbone, tmp_path: Path) -> None:
    plan, heads = plan_for(backbone)
    plan = save_plan(tmp_path, plan, heads)
    loaded, tensors = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    x = torch.randn(4, 8)
    for layer, head in build_heads(loaded, tensors, backbone.description).items():
        assert torch.equal(head(x), heads[layer](x))


def test_a_plan_with_the_heads_of_another_run_is_refused_and_has_another_digest(
        backbone: Backbone, tmp_path: Path) -> None:
    plans = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        plans.append(save_plan(tmp_path / name, *plan_for(backbone)))
    assert plans[0].digest() != plans[1].digest()
    shutil.copy(tmp_path / "other" / "heads.safetensors", tmp_path / "one")
    with pytest.raises(PlanError, match=r"one/plan\.json was made with other heads than those in heads\.safetensors"):
        load_plan(tmp_path / "one" / "plan.json")


def test_an_older_plan_that_names_no_heads_is_read_and_written_again_with_its_digest(
        backbone: Backbone, tmp_path: Path) -> None:
    old, heads = plan_for(backbone)
    save_plan(tmp_path, old, heads)
    write_plan(tmp_path, old, (tmp_path / "heads.safetensors").read_bytes())
    assert "heads" not in json.loads((tmp_path / "plan.json").read_text())
    loaded, tensors = load_plan(tmp_path / "plan.json")
    assert loaded == old and loaded.digest() == old.digest()
    assert build_heads(loaded, tensors, backbone.description).keys() == heads.keys()


def test_a_plan_without_exits_is_legal(backbone: Backbone, tmp_path: Path) -> None:
    save_plan(tmp_path, ExitPlan(backbone.description.sha256, "paper", (), None), {})
    plan, tensors = load_plan(tmp_path / "plan.json")
    assert build_heads(plan, tensors, backbone.description) == {}


def test_a_plan_for_another_backbone_is_refused(backbone: Backbone) -> None:
    plan, _ = plan_for(backbone)
    with pytest.raises(PlanError, match=r"made for the backbone ffff\.\.\., but this one is"):
        build_heads(replace(plan, backbone="ffff"), {}, backbone.description)


def test_missing_head_tensors_are_refused(backbone: Backbone) -> None:
    plan, _ = plan_for(backbone)
    with pytest.raises(PlanError, match="does not fit the head"):
        build_heads(plan, {}, backbone.description)


def test_an_incomplete_plan_names_what_is_missing(backbone: Backbone) -> None:
    plan, _ = plan_for(backbone)
    data = plan.to_json()
    del data["exits"]
    with pytest.raises(PlanError, match="exits"):
        ExitPlan.from_json(data, "plan.json")


def test_exits_out_of_order_are_refused(backbone: Backbone) -> None:
    plan, _ = plan_for(backbone)
    with pytest.raises(PlanError, match="order of cost"):
        replace(plan, exits=plan.exits[::-1])


def test_a_plan_written_before_there_were_safer_settings_is_read(backbone: Backbone) -> None:
    plan, _ = plan_for(backbone)
    data = plan.to_json()
    del data["safer"]
    assert ExitPlan.from_json(data, "plan.json") == replace(plan, safer=())
    assert replace(plan, safer=()).digest() != plan.digest()


def test_a_safer_setting_needs_a_threshold_for_each_exit(backbone: Backbone) -> None:
    plan, _ = plan_for(backbone)
    with pytest.raises(PlanError, match="2 thresholds"):
        replace(plan, safer=((0.9,),))


@pytest.mark.parametrize(("risk", "assumption"), [
    (Risk.CONFIDENCE_GAP, "as long as the backbone is not under-confident"),
    (Risk.ACCURACY, "as long as the requests that have labels are a random sample of the traffic")])
def test_a_certificate_says_what_it_assumes(risk: Risk, assumption: str, backbone: Backbone) -> None:
    certificate = plan_for(backbone)[0].certificate
    assert certificate is not None and "as long as" not in certificate.in_words()
    assert assumption in replace(certificate, risk=risk).in_words()


@pytest.mark.parametrize(("confidence", "words"), [
    (0.95, "With 95% "), (0.975, "With 97.5% "), (0.9999999, "With 99.99999% "), (1 - 1e-12, "With 99.9999999% ")])
def test_no_certificate_says_that_it_is_certain(confidence: float, words: str) -> None:
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, confidence, 1500, 0, 0.0, 0.0, "fixed-sequence", (1.0, 2.0))
    assert certificate.in_words().startswith(words)


def test_a_plan_with_a_risk_that_is_not_known_is_refused(backbone: Backbone) -> None:
    data = json.loads(json.dumps(plan_for(backbone)[0].to_json()))
    data["certificate"]["risk"] = "hope"
    with pytest.raises(PlanError, match="'hope' is not a valid Risk"):
        ExitPlan.from_json(data, "plan.json")
