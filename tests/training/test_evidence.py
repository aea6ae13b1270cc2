"""What counts as evidence: records whose content is known and all of whose values could be recorded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.scores import NO_CLASS
from early_exit.handler.errors import RecordError
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.format import read_header, read_shard, read_times, write_shard
from early_exit.training.data.dataset import NOT_FINITE, load_traffic
from early_exit.training.data.shards import find_shards
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import Rule, TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.planning.predictions import HeadPredictions
from tests.support.residual import N_RECORDS

OPTIONS = TrainingOptions(tolerance=0.05, measure="flops", search=None, recipe=Distillation(epochs=10))


def test_records_of_which_the_content_is_not_known_train_and_certify_nothing(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    header = read_header(shards[0])
    known = read_shard(shards[0], header.layers)
    (tmp_path / "records").mkdir()
    old = tmp_path / "records" / shards[0].name
    write_shard(old, header, replace(known, content=torch.full_like(known.content, UNKNOWN_CONTENT)))
    with pytest.raises(RecordError, match=f"{len(known)} more records can train heads but prove nothing, because "
                                          "their contents are not known: an earlier version wrote these records"):
        train("model", archive, [old], OPTIONS, RunPaths(tmp_path / "alone"))
    with_others = train("model", archive, [old, *shards[1:]], OPTIONS, RunPaths(tmp_path / "run")).records
    without = train("model", archive, shards[1:], OPTIONS, RunPaths(tmp_path / "without")).records
    assert with_others == {**without, "train": without["train"] + len(known)}


def changed(shard: Path, to: Path, number: int, **header: object) -> Path:
    """Copy a shard with other values in its header; return the copy."""
    found = read_header(shard)
    copy = to / f"{number}-{shard.name}"
    write_shard(copy, replace(found, **header), read_shard(shard, found.layers))  # type: ignore[arg-type]
    return copy


def test_records_of_other_traffic_are_skipped_with_their_number_and_other_keys_are_told(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards, lines = find_shards(records, "model", backbone.description), list[str]()
    other = changed(shards[0], tmp_path, 0, traffic="0" * 64)
    another_key = changed(shards[1], tmp_path, 1, content_key="0" * 16)
    found = train("model", archive, [other, another_key, *shards[2:]], OPTIONS, RunPaths(tmp_path / "run"),
                  log=lines.append).records
    assert found == train("model", archive, shards[1:], OPTIONS, RunPaths(tmp_path / "without")).records
    n_others = len(read_shard(other, []))
    assert any(line.startswith(f"{n_others} records are skipped: ") for line in lines)
    assert any("hashed with 2 keys" in line for line in lines)


def test_what_was_not_finite_is_counted_in_log_and_report(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards, lines = find_shards(records, "model", backbone.description), list[str]()
    header = read_header(shards[0])
    found = read_shard(shards[0], header.layers)
    scores = found.log_probabilities.clone()
    scores[0] = torch.nan  # the last release recorded such scores
    shard = tmp_path / shards[0].name
    write_shard(shard, replace(header, n_not_finite=3), replace(found, log_probabilities=scores))
    report = train("model", archive, [shard, *shards[1:]], OPTIONS, RunPaths(tmp_path / "run"), log=lines.append)
    assert dict(report.skipped) == {NOT_FINITE: 4}
    assert f"4 requests are skipped: {NOT_FINITE}" in lines


def test_times_are_those_of_a_clock_that_nobody_set(backbone: Backbone, records: Path, tmp_path: Path) -> None:
    [shard, *_] = find_shards(records, "model", backbone.description)
    header = read_header(shard)
    found = read_shard(shard, header.layers)
    n = len(found)
    true = 1.7e9 + torch.arange(n, dtype=torch.float64)
    jumped = true + torch.where((torch.arange(n) >= 4) & (torch.arange(n) < 8), 40 * 86400.0, 0.0)
    write_shard(tmp_path / shard.name, replace(header, worker="a worker"),
                replace(found, sequence=torch.arange(n), time=jumped))
    assert load_traffic([tmp_path / shard.name]).time.max() == true[-1]


def with_infinite(shard: Path, to: Path, rows: slice, layers: slice) -> Path:
    """Copy a shard, with infinities in some rows of some layers, as for values that float16 cannot hold."""
    header = read_header(shard)
    found = read_shard(shard, header.layers)
    activations = {layer: activation.clone() for layer, activation in found.activations.items()}
    for layer in header.layers[layers]:
        activations[layer][rows] = torch.inf
    write_shard(to, header, replace(found, activations=activations))
    return to


def test_a_few_rows_that_float16_cannot_hold_cost_themselves_and_not_the_layer(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    first, last = (with_infinite(shard, tmp_path / shard.name, slice(0, 3), slice(1, 2))
                   for shard in (shards[0], shards[-1]))
    run = RunPaths(tmp_path / "run")
    others = [Path(shutil.copy(shard, tmp_path)) for shard in shards[1:-1]]
    report = train("model", archive, [first, *others, last], OPTIONS, run)
    layer = read_header(shards[0]).layers[1]
    assert layer in {head.layer for head in report.heads}
    training_set = TrainingSet.load(run.training_set)
    assert int((~training_set.finite).sum()) == 6
    for part in (Part.TRAIN, Part.TUNE):
        assert bool(training_set.finite[training_set.rows(part)].all())
    certify = training_set.rows(Part.CERTIFY)
    unknown = ~training_set.finite[certify]
    predictions = HeadPredictions.load(run.predictions)
    assert bool(unknown.any())
    judged = predictions.certify.candidates
    assert bool((judged.confidence[unknown] == 1).all()) and bool((judged.losses[unknown] == 1).all())
    assert not bool(judged.agrees[unknown].any())
    assert bool((predictions.certify.answers[unknown] == NO_CLASS).all()), "the report does not count them as right"


def test_a_layer_that_float16_cannot_hold_is_left_out_with_a_word(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    layer = read_header(shards[0]).layers[1]
    broken = [with_infinite(shard, tmp_path / shard.name, slice(None, None, 20), slice(1, 2)) for shard in shards]
    report = train("model", archive, broken, OPTIONS, RunPaths(tmp_path / "run"))
    assert layer not in {head.layer for head in report.heads}
    assert any(line.startswith(f"{layer}: ") and "too large for float16" in line for line in report.left_out)


@pytest.mark.parametrize("rule", ["certified", "paper"])
def test_no_plan_is_certified_if_workers_dropped_many_of_the_records_beside_those_that_certify(
        rule: Rule, backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    """A disk that is too slow loses the records of the busiest times, which may be of another kind."""
    options = replace(OPTIONS, thresholds=rule)
    few = round(0.1 * options.tolerance * Part.CERTIFY.share * N_RECORDS) - 1

    def trained(n_dropped: int, *, newest: bool) -> None:
        folder = tmp_path / f"{n_dropped}-{newest}"
        shutil.copytree(records, folder)
        shards = find_shards(folder, "model", backbone.description)
        shard = sorted(shards, key=lambda path: float(read_times(path).max()))[-1 if newest else 0]
        header, found = read_header(shard), read_shard(shard, read_header(shard).layers)
        when = float(found.time.max())
        write_shard(shard, replace(header, n_dropped=n_dropped, dropped=(when, when)), found)
        train("model", archive, shards, options, RunPaths(folder / "run"))

    trained(few, newest=True)
    trained(N_RECORDS, newest=False)
    if rule == "certified":
        with pytest.raises(RecordError, match="% of the records of the time of those that certify were dropped"):
            trained(10 * few, newest=True)
    else:
        trained(10 * few, newest=True)
