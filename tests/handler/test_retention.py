"""Retention deletes shards of its own model and nothing else, whatever other files are in the folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import ShardHeader
from early_exit.handler.recording.retention import enforce_limits, shard_name

HEADER = ShardHeader("digits", "2.0", "ab12", 4, ("layer1",))
SHARD = shard_name("2.0", 4711, 17_000_000_000, 0)
SCRATCH = f".{SHARD}.k3j4h5.writing"


def old_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"0" * 100)
    os.utime(path, (time.time() - 10_000, time.time() - 10_000))
    return path


def test_what_is_too_old_goes_and_what_a_killed_worker_left(tmp_path: Path) -> None:
    for name in (SHARD, SCRATCH):
        old_file(HEADER.folder(tmp_path) / name)
    enforce_limits(tmp_path, "digits", 5000, 2**30)
    assert list(HEADER.folder(tmp_path).iterdir()) == []


@pytest.mark.parametrize("name", [
    "digits/ab12/weights.safetensors", "digits/ab12/2.0-copy.safetensors", "digits/ab12/notes.writing",
    "digits/ab12/monitor-2.0-ab.json", f"digits/{SHARD}", f"digits/mine/{SHARD}", f"digits/ab12/kept/{SHARD}",
    f"other/ab12/{SHARD}", SHARD])
def test_files_that_are_not_a_models_shards_by_name_and_folder_survive(name: str, tmp_path: Path) -> None:
    foreign, ours = old_file(tmp_path / name), old_file(HEADER.folder(tmp_path) / SHARD)
    enforce_limits(tmp_path, "digits", 1, 1)
    assert foreign.exists() and not ours.exists()


def test_foreign_files_do_not_count_towards_the_size_either(tmp_path: Path) -> None:
    old_file(tmp_path / "digits" / "ab12" / "weights.safetensors")
    ours = old_file(HEADER.folder(tmp_path) / SHARD)
    enforce_limits(tmp_path, "digits", 1e9, 150)
    assert ours.exists()


def test_a_shard_that_cannot_be_deleted_still_counts_towards_the_size(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [old_file(HEADER.folder(tmp_path) / shard_name("2.0", 4711, 17_000_000_000, number))
              for number in range(4)]
    for number, shard in enumerate(shards):
        os.utime(shard, (time.time() - 1000 + number, time.time() - 1000 + number))
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == shards[0]:
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    enforce_limits(tmp_path, "digits", 1e9, 250)
    assert [shard.exists() for shard in shards] == [True, False, False, True]


def test_shards_that_cannot_be_deleted_and_fill_the_limit_leave_the_newest_and_are_reported_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stuck = [old_file(HEADER.folder(tmp_path) / shard_name("1.0", 4711, 17_000_000_000, number)) for number in range(3)]
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path in stuck:
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    for number in range(3):
        newest = old_file(HEADER.folder(tmp_path) / shard_name("2.0", 4712, 17_000_000_000, number))
        os.utime(newest, (time.time() - 1000 + number, time.time() - 1000 + number))
        enforce_limits(tmp_path, "digits", 1e9, 250)
        assert set(HEADER.folder(tmp_path).iterdir()) == {*stuck, newest}
    [line] = caplog.messages
    assert "3 shards in" in line and "records_max_bytes, which is 250," in line and str(stuck[0]) in line
    enforce_limits(tmp_path, "digits", 1, 250)
    assert not newest.exists(), "it is too old"


@pytest.mark.parametrize("link", ["digits", "digits/ab12"])
def test_a_link_to_a_folder_with_the_shards_of_others_is_not_followed(link: str, tmp_path: Path) -> None:
    others = old_file(tmp_path / "elsewhere" / "ab12" / SHARD)
    (tmp_path / "records" / link).parent.mkdir(parents=True)
    (tmp_path / "records" / link).symlink_to(others.parent if link.endswith("ab12") else others.parent.parent)
    enforce_limits(tmp_path / "records", "digits", 1, 1)
    assert others.exists()


@pytest.mark.parametrize("model", ["..", "../elsewhere", "/tmp", ""])
def test_a_model_whose_name_leads_elsewhere_is_refused(model: str, tmp_path: Path) -> None:
    others = old_file(tmp_path / "elsewhere" / "ab12" / SHARD)
    (tmp_path / "records").mkdir()
    with pytest.raises(RecordError, match="expected a bare name"):
        enforce_limits(tmp_path / "records", model, 1, 1)
    assert others.exists()
