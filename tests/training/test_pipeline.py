"""From records in a folder to a plan, with a real backbone and with records that a real worker wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import ConfigError, RecordError
from early_exit.handler.exits.head import HeadSpec
from early_exit.handler.exits.plan import build_heads, load_plan
from early_exit.handler.exits.risk import Risk
from early_exit.handler.files.private import replacing
from early_exit.handler.model.loading import build_model
from early_exit.handler.recording.format import (
    ANONYMOUS,
    Records,
    ShardHeader,
    list_shards,
    read_header,
    read_shard,
    write_shard,
)
from early_exit.training.data.dataset import load_traffic
from early_exit.training.data.shards import find_shards, of_newest_setting, recorded_layers
from early_exit.training.data.split import Part, SplitRule
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.space import SearchSpace
from early_exit.training.options import Rule, TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.support.recording import record
from tests.support.residual import N_RECORDS, Residual, recorded_inputs

OPTIONS = TrainingOptions(tolerance=0.05, measure="flops", search=None, recipe=Distillation(epochs=10))


def test_every_record_has_one_part_and_the_parts_have_their_shares(backbone: Backbone, records: Path) -> None:
    traffic = load_traffic(find_shards(records, "model", backbone.description))
    assert len(traffic) == N_RECORDS
    assert traffic.part.tolist().count(-1) == 0
    for part in Part:
        assert traffic.size(part) / N_RECORDS == pytest.approx(part.share, abs=0.04)


def test_a_record_that_is_split_at_random_stays_in_its_part(backbone: Backbone, records: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    few, all_of_them = (load_traffic(read, rule=SplitRule.RANDOM) for read in (shards[:3], shards))
    part_of = dict(zip(all_of_them.request.tolist(), all_of_them.part.tolist()))
    assert [part_of[request] for request in few.request.tolist()] == few.part.tolist()


def test_only_fresh_records_tune_and_certify(backbone: Backbone, records: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    after = load_traffic(shards).time.median().item()
    traffic = load_traffic(shards, after)
    fresh = traffic.time > after
    assert 0 < int(fresh.sum()) < N_RECORDS
    assert set(traffic.part[~fresh].tolist()) == {Part.TRAIN.number}
    for part in Part:
        assert int((traffic.part[fresh] == part.number).sum()) == pytest.approx(part.share * int(fresh.sum()), abs=2)
    first = [traffic.time[fresh & (traffic.part == part.number)].min() for part in Part]
    assert first == sorted(first), "what came last certifies"


def test_a_request_that_was_run_twice_counts_once(backbone: Backbone, tmp_path: Path) -> None:
    inputs = torch.randn(40, 16)
    record(backbone, inputs, tmp_path)
    record(backbone, inputs[:10], tmp_path)
    assert len(load_traffic(list_shards(tmp_path))) == 40


def test_the_records_of_another_backbone_are_not_mixed_in(backbone: Backbone, records: Path) -> None:
    other = Backbone.from_module(nn.Sequential(*(Residual() for _ in range(3)), nn.Linear(16, 4)), (16,))
    with pytest.raises(RecordError, match="has no records of model with the backbone .*; it has model"):
        find_shards(records, "model", other.description)


def true_classes(log_probabilities: Tensor) -> Tensor:
    """Return (N,) int64 labels drawn from the backbone's own probabilities, as if it were perfectly calibrated."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return torch.distributions.Categorical(logits=log_probabilities).sample()


def written(labels: Tensor, path: Path) -> Path:
    path.write_text("".join(f"request-{number},{label}\n" for number, label in enumerate(labels.tolist())))
    return path


@pytest.mark.parametrize(("rule", "risk"), [
    ("certified", Risk.DISAGREEMENT), ("certified", Risk.CONFIDENCE_GAP), ("certified", Risk.ACCURACY),
    ("paper", Risk.DISAGREEMENT), ("equal", Risk.DISAGREEMENT)])
def test_a_run_makes_a_plan_that_serves_as_it_reports(
        rule: Rule, risk: Risk, backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    options = replace(OPTIONS, thresholds=rule, risk=risk)
    with torch.no_grad():
        labels = written(true_classes(backbone.graph(recorded_inputs()).log_softmax(dim=1)), tmp_path / "labels.csv")
    report = train("model", archive, find_shards(records, "model", backbone.description), options, run, labels=labels)
    plan, tensors = load_plan(run.plan)
    assert plan == report.plan
    assert plan.exits, "this backbone is easy enough to exit from"
    assert (plan.certificate is not None) == (rule == "certified")
    assert json.loads(run.report_json.read_text())["flops_ratio"] == report.deployed.flops < 1
    fresh = torch.randn(4000, 16, generator=torch.Generator().manual_seed(2))
    served = build_model(backbone, plan, build_heads(plan, tensors, backbone.description))
    with torch.no_grad():
        answers, log_probabilities = served(fresh).argmax(1), backbone.graph(fresh).log_softmax(dim=1)
    full = log_probabilities.argmax(dim=1)
    left = (served.log.take()[0].answers.stages >= 0).double().mean().item()
    assert left == pytest.approx(sum(exit.together.hit_rate for exit in report.exits), abs=0.05)
    assert (answers != full).double().mean().item() == pytest.approx(report.deployed.disagreement, abs=0.03)
    losses = risk.losses(answers[:, None], full, log_probabilities, true_classes(log_probabilities))
    assert losses.mean() <= OPTIONS.tolerance + 0.01


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


@pytest.mark.parametrize("rule", ["certified", "paper"])
def test_records_that_name_no_request_certify_nothing_and_the_error_says_that_there_are_some(
        rule: Rule, backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    [shard, *_] = find_shards(records, "model", backbone.description)
    header = read_header(shard)
    known = read_shard(shard, header.layers)
    (tmp_path / "records").mkdir()
    unknown = tmp_path / "records" / shard.name
    write_shard(unknown, header, replace(known, request=torch.full_like(known.request, ANONYMOUS)))
    with pytest.raises(RecordError, match=f"{len(known)} more records .* their requests are not known"):
        train("model", archive, [unknown], replace(OPTIONS, thresholds=rule), RunPaths(tmp_path / "run"))


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
    lines: list[str] = []
    train("model", archive, shards, OPTIONS, run, log=lines.append)
    assert "continues with the 5 shards" in lines[0] and "another --to" in lines[0]


def test_an_impossible_tolerance_gives_a_plan_without_exits(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    """The heads have hardly learned, so few of their answers can be trusted, and a plan without exits is valid."""
    shards = find_shards(records, "model", backbone.description)
    options = replace(OPTIONS, tolerance=0.004, recipe=Distillation(epochs=3, learning_rate=1e-3))
    report = train("model", archive, shards, options, RunPaths(tmp_path / "run"))
    assert report.plan.exits == ()
    assert report.deployed.disagreement == 0 and report.deployed.flops == 1


def test_a_certificate_is_about_the_time_of_the_records_that_certify(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    every = load_traffic(shards)
    after = every.time.sort().values[N_RECORDS // 3].item()
    report = train("model", archive, shards, replace(OPTIONS, fresh_after=after), RunPaths(tmp_path / "run"))
    assert report.plan.certificate is not None
    split = load_traffic(shards, after)
    certified_from = split.time[split.part == Part.CERTIFY.number].min().item()
    assert report.plan.certificate.window == (certified_from, every.time.max().item())
    assert certified_from > after


def test_a_head_for_a_layer_without_records_is_refused_with_the_one_that_was_meant(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    layer = backbone.description.candidates[0].path
    options = replace(OPTIONS, space=SearchSpace(heads={f"{layer}x": HeadSpec()}))
    with pytest.raises(ConfigError, match=f"for '{layer}x', but this run has no records .* did you mean '{layer}'"):
        train("model", archive, find_shards(records, "model", backbone.description), options, RunPaths(tmp_path))


def test_records_of_an_older_setting_are_skipped_and_counted(
        backbone: Backbone, archive: ArchiveLayout, tmp_path: Path) -> None:
    inputs = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1))
    record(backbone, inputs[:100], tmp_path / "records", pool=2)
    record(backbone, inputs[100:], tmp_path / "records", first_request=100, pool=4)
    shards = find_shards(tmp_path / "records", "model", backbone.description)
    lines: list[str] = []
    report = train("model", archive, shards, OPTIONS, RunPaths(tmp_path / "run"), log=lines.append)
    assert sum(report.records.values()) == 900
    assert any("100 records are skipped: they were recorded with another early_exit.pool" in line for line in lines)


def test_shards_with_layers_in_common_are_used_together(tmp_path: Path) -> None:
    old, other, new = (written_shard(tmp_path, time, layers) for time, layers in enumerate(
        [("a", "b", "c"), ("d",), ("b", "c")]))
    assert of_newest_setting([old, other, new]) == [old, new]
    assert recorded_layers([old, new]) == ({"b", "c"}, 4)


def written_shard(folder: Path, time: float, layers: tuple[str, ...]) -> Path:
    path = folder / f"{time}.safetensors"
    write_shard(path, ShardHeader("model", "1.0", "ab", 4, layers), Records(
        torch.zeros(2, 3).half(), *(torch.zeros(2).int() for _ in range(3)), torch.zeros(2).short(), torch.arange(2),
        torch.zeros(2).int(), torch.arange(2), torch.arange(2),
        torch.full((2,), time, dtype=torch.float64), torch.ones(2),
        activations={layer: torch.zeros(2, 3).half() for layer in layers}))
    return path


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as scratch:
        scratch.write_text("half")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
