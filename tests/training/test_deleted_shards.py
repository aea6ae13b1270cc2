"""Retention deletes shards while a run reads them: the run goes on with the others, and an attempt is not refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import RecordError
from early_exit.training.data.shards import find_shards
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.training.test_evidence import changed
from tests.training.test_run_folder import OPTIONS


@pytest.fixture
def shards(backbone: Backbone, records: Path, tmp_path: Path) -> list[Path]:
    """The shards of a copy of the records, the oldest first."""
    copy = shutil.copytree(records, tmp_path / "records")
    return sorted(find_shards(copy, "model", backbone.description))


def test_shards_that_are_deleted_before_or_while_they_are_read_are_left_out(
        archive: ArchiveLayout, shards: list[Path], tmp_path: Path) -> None:
    other = changed(shards[0], tmp_path, 0, traffic="0" * 64)  # the run tells its number after it has read the headers
    lines = list[str]()

    def retention(line: str) -> None:
        if "records are skipped" in line:
            shards[1].unlink(missing_ok=True)
        lines.append(line)

    run, alone = RunPaths(tmp_path / "run"), RunPaths(tmp_path / "alone")
    run.training_set.root.mkdir(parents=True)
    run.training_set.progress.write_text("of a replay of all shards")
    shards[0].unlink()
    report = train("model", archive, [other, *shards], OPTIONS, run, log=retention)
    n = len(shards) + 1
    assert [line for line in lines if "deleted meanwhile" in line] == [
        f"1 of {number} shards were deleted meanwhile, as too old or too many records are: the run begins again with "
        "the others" for number in (n, n - 1)]
    assert report.records == train("model", archive, shards[2:], OPTIONS, alone).records
    assert json.loads(run.inputs.read_text())["shards"] == [str(shard.resolve()) for shard in (other, *shards[2:])]
    assert not run.training_set.progress.exists(), "its rows are those of other records"


def test_a_run_that_is_continued_leaves_out_what_was_deleted_since(
        archive: ArchiveLayout, shards: list[Path], tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    first = train("model", archive, shards, OPTIONS, run).records
    run.training_set.index.unlink()  # it was stopped before
    shards[0].unlink()
    again = train("model", archive, shards[1:], OPTIONS, run).records
    assert sum(again.values()) < sum(first.values())
    assert json.loads(run.inputs.read_text())["shards"] == [str(shard.resolve()) for shard in shards[1:]]


def test_if_all_are_deleted_or_one_is_damaged_the_reason_is_told(
        archive: ArchiveLayout, shards: list[Path], tmp_path: Path) -> None:
    shards[0].write_bytes(b"")
    with pytest.raises(RecordError, match=f"cannot read the record shard {shards[0]}"):
        train("model", archive, shards, OPTIONS, RunPaths(tmp_path / "damaged"))
    for shard in shards:
        shard.unlink()
    with pytest.raises(RecordError, match="cannot read the record shard"):
        train("model", archive, shards, OPTIONS, RunPaths(tmp_path / "gone"))
