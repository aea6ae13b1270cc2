"""The cost of a plan on the records of another run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.exits.plan import build_heads, load_plan
from early_exit.training.data.shards import find_shards
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.planning.reassess import cost_on_run
from tests.training.test_pipeline import OPTIONS


def test_on_its_own_run_a_plan_costs_what_it_says_and_less_where_more_may_leave(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    shards = find_shards(records, "model", backbone.description)
    train("model", archive, shards, OPTIONS, run)
    plan, tensors = load_plan(run.plan)
    heads = build_heads(plan, tensors, backbone.description)
    assert plan.exits, "the test needs a plan with exits"

    def cost(of: object = plan) -> float | None:
        return cost_on_run(of, heads, run, backbone.description, OPTIONS)  # type: ignore[arg-type]

    assert cost() == pytest.approx(plan.expected_cost)
    bolder = replace(plan, exits=tuple(
        replace(planned, policy=replace(planned.policy, threshold=0.2)) for planned in plan.exits))
    assert cost(bolder) < plan.expected_cost  # type: ignore[operator]
    first, *others = plan.exits
    pooled_otherwise = replace(first, head=replace(first.head, recorded=2))
    assert cost(replace(plan, exits=(pooled_otherwise, *others))) is None
    assert cost(replace(plan, exits=(replace(first, layer="not.recorded"), *others))) is None
