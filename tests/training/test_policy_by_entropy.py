"""Training works with any registered policy: the one that is registered here is fitted, timed, certified and served."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import PlanError
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import build_heads, load_plan, save_plan
from early_exit.handler.exits.policy import NEVER, POLICIES, PlannedPolicy
from early_exit.handler.model.loading import load_model
from early_exit.handler.protocol import FULL
from early_exit.training.costs.profiling import profile_exit
from early_exit.training.data.shards import find_shards
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.planning.choose import choose
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.selection.calibrate import fit_temperature
from tests.support.entropy import EntropyPolicy


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, EntropyPolicy.kind, EntropyPolicy)


def test_a_plan_by_another_policy_is_trained_certified_written_and_served(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    options = TrainingOptions(tolerance=0.05, measure="flops", search=None, recipe=Distillation(epochs=10),
                              policy=EntropyPolicy.kind)
    report = train("model", archive, find_shards(records, "model", backbone.description), options, run)
    plan, tensors = load_plan(run.plan)
    heads = build_heads(plan, tensors, backbone.description)
    assert plan == report.plan and plan.exits and plan.certificate and plan.safer

    training_set = TrainingSet.load(run.training_set)
    tune = training_set.rows(Part.TUNE)
    predictions = HeadPredictions.load(run.predictions)
    for planned in plan.exits:
        assert isinstance(planned.policy, EntropyPolicy)
        fitted = predictions.policies[predictions.layers.index(planned.layer)]
        assert planned.policy == replace(fitted, threshold=planned.threshold)
        activations = training_set.activations(backbone.description.layer(planned.layer))[tune].float()
        with torch.no_grad():
            logits = heads[planned.layer](activations)
        assert planned.policy.temperature == pytest.approx(
            fit_temperature(logits, training_set.backbone_class[tune]), rel=1e-3)
        largest = torch.distributions.Categorical(logits=logits / planned.policy.temperature).entropy().max().item()
        assert planned.policy.scale == pytest.approx(math.log(4) / largest, rel=1e-3)
    point = choose(predictions, options)
    assert [planned.threshold for planned in plan.exits] == list(point.thresholds), "a report chooses the same again"

    layout = ArchiveLayout(tmp_path / "archive")
    shutil.copytree(archive.folder, layout.folder)
    save_plan(layout.folder, plan, heads)
    model = load_model(layout, ServingConfig(control_rate=0))
    fresh = torch.randn(4000, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        answers, full = model(fresh).argmax(dim=1), backbone.graph(fresh).argmax(dim=1)
    stages = model.log.take()[0].answers.stages
    hits = sum(exit.together.hit_rate for exit in report.exits)
    assert (stages != FULL).double().mean().item() == pytest.approx(hits, abs=0.05) and hits > 0.1
    assert (answers != full).double().mean() <= options.tolerance + 0.01


def test_what_is_timed_is_the_policy_that_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PlannedPolicy] = []
    decide = EntropyPolicy.confidence

    def confidence(policy: EntropyPolicy, logits: Tensor) -> Tensor:
        asked.append(policy)
        return decide(policy, logits)

    monkeypatch.setattr(EntropyPolicy, "confidence", confidence)
    layer, head = CandidateLayer("layer", "layer", (12,), 0.4), Head(HeadSpec(widths=()), (12,), 3).eval()
    profile_exit(head, layer, EntropyPolicy.kind, sizes=(1, 2))
    timed = [policy for policy in asked if policy.threshold < NEVER]
    assert len(timed) > 4, "both sizes, in several rounds"
    assert all(policy.temperature == 1 for policy in timed), "the head computes the answers itself"


def test_a_policy_that_this_version_does_not_know_is_refused_before_training() -> None:
    with pytest.raises(PlanError, match="expected one of the policies confidence, entropy, found 'entropie'"):
        TrainingOptions(policy="entropie")
