"""From records in a folder to a plan, on a real backbone with records that its own handler code wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from early_exit.handler.backbone import Backbone
from early_exit.handler.errors import RecordError
from early_exit.handler.layout import ArchiveLayout
from early_exit.handler.plan import build_heads, load_plan
from early_exit.handler.records import list_shards
from early_exit.handler.served import ServedModel
from early_exit.training.dataset import Part, find_shards, load_traffic
from early_exit.training.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths, replacing
from early_exit.training.pipeline import train
from tests.support.recording import record
from tests.support.residual import N_RECORDS, Residual

OPTIONS = TrainingOptions(tolerance=0.05, measure="flops", search=None, recipe=Distillation(epochs=10))


def test_every_record_has_one_part_and_the_parts_have_their_shares(backbone: Backbone, records: Path) -> None:
    traffic = load_traffic(find_shards(records, "model", backbone.description))
    assert len(traffic) == N_RECORDS
    assert traffic.part.tolist().count(-1) == 0
    for part in Part:
        assert traffic.size(part) / N_RECORDS == pytest.approx(part.share, abs=0.04)


def test_a_record_stays_in_its_part_when_others_are_added(backbone: Backbone, records: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    few, all_of_them = load_traffic(shards[:3]), load_traffic(shards)
    part_of = dict(zip(all_of_them.request.tolist(), all_of_them.part.tolist()))
    assert [part_of[request] for request in few.request.tolist()] == few.part.tolist()


def test_only_fresh_records_tune_and_certify(backbone: Backbone, records: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    every = load_traffic(shards)
    after = every.time.median().item()
    traffic = load_traffic(shards, after)
    fresh = traffic.time > after
    assert 0 < int(fresh.sum()) < N_RECORDS
    assert torch.equal(traffic.part[fresh], every.part[fresh])
    assert set(traffic.part[~fresh].tolist()) == {list(Part).index(Part.TRAIN)}


def test_a_request_that_was_run_twice_counts_once(backbone: Backbone, tmp_path: Path) -> None:
    inputs = torch.randn(40, 16)
    record(backbone, inputs, tmp_path)
    record(backbone, inputs[:10], tmp_path)
    assert len(load_traffic(list_shards(tmp_path))) == 40


def test_the_records_of_another_backbone_are_not_mixed_in(backbone: Backbone, records: Path) -> None:
    other = Backbone.from_module(nn.Sequential(*(Residual() for _ in range(3)), nn.Linear(16, 4)), (16,))
    with pytest.raises(RecordError, match="has no records of model with the backbone .*; it has model"):
        find_shards(records, "model", other.description)


@pytest.mark.parametrize("rule", ["certified", "paper", "equal"])
def test_a_run_makes_a_plan_that_serves_as_it_reports(
        rule: str, backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    options = replace(OPTIONS, thresholds=rule)  # type: ignore[arg-type]
    report = train("model", archive, find_shards(records, "model", backbone.description), options, run)
    plan, tensors = load_plan(run.plan)
    assert plan == report.plan
    assert plan.exits, "this backbone is easy enough to exit from"
    assert (plan.certificate is not None) == (rule == "certified")
    assert json.loads(run.report_json.read_text())["flops_ratio"] == report.flops_ratio < 1
    fresh = torch.randn(4000, 16, generator=torch.Generator().manual_seed(2))
    served = ServedModel(backbone, plan, build_heads(plan, tensors, backbone.description))
    with torch.no_grad():
        differs = (served(fresh).argmax(1) != backbone.graph(fresh).argmax(1)).double().mean().item()
    left = (served.take_served()[0].answers.stages >= 0).double().mean().item()
    assert left == pytest.approx(sum(one.hit_rate for one in report.exits), abs=0.05)
    assert differs == pytest.approx(report.disagreement, abs=0.03)
    assert differs <= OPTIONS.tolerance + 0.01


def test_a_stopped_run_keeps_its_heads_and_its_records(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    run = RunPaths(tmp_path / "run")
    first = train("model", archive, shards, OPTIONS, run)
    made = {path: path.stat().st_mtime_ns for path in (run.root / "heads").iterdir()}
    next(iter(made)).unlink()
    run.plan.unlink()
    again = train("model", archive, shards[:1], OPTIONS, run)
    kept = [path for path, modified in made.items() if path.stat().st_mtime_ns == modified]
    assert len(kept) == len(made) - 1
    assert again.to_json() == first.to_json()


def test_a_folder_of_another_run_is_refused(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    run = RunPaths(tmp_path / "run")
    train("model", archive, shards, OPTIONS, run)
    with pytest.raises(RecordError, match="another --to"):
        train("model", archive, shards, replace(OPTIONS, tolerance=0.1), run)


def test_too_few_records_write_no_plan(backbone: Backbone, archive: ArchiveLayout, tmp_path: Path) -> None:
    record(backbone, torch.randn(100, 16), tmp_path / "records")
    run = RunPaths(tmp_path / "run")
    shards = find_shards(tmp_path / "records", "model", backbone.description)
    with pytest.raises(RecordError, match="needs at least 59 .* No plan was written"):
        train("model", archive, shards, OPTIONS, run)
    assert not run.plan.exists()


def test_collecting_more_after_too_few_is_enough(backbone: Backbone, archive: ArchiveLayout, tmp_path: Path) -> None:
    record(backbone, torch.randn(100, 16), tmp_path / "records")
    run = RunPaths(tmp_path / "run")
    with pytest.raises(RecordError):
        train("model", archive, find_shards(tmp_path / "records", "model", backbone.description),
              OPTIONS, run)
    record(backbone, torch.randn(900, 16), tmp_path / "records", first_request=100)
    shards = find_shards(tmp_path / "records", "model", backbone.description)
    assert sum(train("model", archive, shards, OPTIONS, run).records.values()) == 1000


def test_a_run_that_goes_on_with_fewer_records_than_there_are_says_so(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    run = RunPaths(tmp_path / "run")
    train("model", archive, shards[:5], OPTIONS, run)
    said: list[str] = []
    train("model", archive, shards, OPTIONS, run, say=said.append)
    assert "goes on with the 5 shards" in said[0] and "another --to" in said[0]


def test_an_impossible_tolerance_gives_a_plan_without_exits(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    """Random targets: nothing the heads say can be trusted, and no exit is a legal answer."""
    shards = find_shards(records, "model", backbone.description)
    options = replace(OPTIONS, tolerance=0.004, recipe=Distillation(epochs=1, learning_rate=1e-9))
    report = train("model", archive, shards, options, RunPaths(tmp_path / "run"))
    assert report.disagreement <= 0.004
    assert report.flops_ratio == pytest.approx(1, abs=0.05)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
