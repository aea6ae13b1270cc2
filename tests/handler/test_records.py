"""Shards are written completely or not at all, stay within their budget, and never cost an answer."""

from __future__ import annotations

import errno
import logging
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import (
    COLUMNS,
    Records,
    ShardHeader,
    list_shards,
    read_header,
    read_shard,
    read_times,
    write_shard,
)
from early_exit.handler.recording.retention import shard_name
from early_exit.handler.recording.writer import RecordWriter

HEADER = ShardHeader("digits", "2.0", "ab12", 4, ("layer1", "layer2"))


def some_records(count: int, *, kept: list[bytes] | None = None) -> Records:
    return Records(
        activations={"layer1": torch.randn(count, 3, 4, 4).half(), "layer2": torch.randn(count, 5).half()},
        log_probabilities=torch.randn(count, 10).log_softmax(1).half(),
        backbone_class=torch.randint(10, (count,)).int(), full_class=torch.randint(10, (count,)).int(),
        answered_class=torch.randint(10, (count,)).int(),
        exit=torch.full((count,), -1, dtype=torch.int16), request=torch.randint(2**62, (count,)),
        row=torch.randint(9, (count,)).int(), content=torch.randint(2**62, (count,)), sequence=torch.arange(count),
        time=torch.full((count,), 1e9, dtype=torch.float64), sampling_rate=torch.ones(count), kept=kept)


def assert_same(found: Records, expected: Records) -> None:
    assert found.kept == expected.kept
    for name in COLUMNS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for layer, activation in expected.activations.items():
        assert torch.equal(found.activations[layer], activation)


@settings(max_examples=25)
@given(kept=st.lists(st.binary(max_size=40), min_size=1, max_size=6))
def test_a_shard_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, kept: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("shards") / "a.safetensors"
    records = some_records(len(kept), kept=kept)
    write_shard(path, HEADER, records)
    assert read_header(path) == HEADER
    assert torch.equal(read_times(path), records.time)
    assert_same(read_shard(path, HEADER.layers, kept=True), records)


def test_only_the_asked_layers_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", HEADER, some_records(2))
    assert list(read_shard(tmp_path / "a.safetensors", ["layer2"]).activations) == ["layer2"]


def test_a_pipe_that_is_called_a_shard_is_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.safetensors", HEADER, some_records(1))
    os.mkfifo(tmp_path / "b.safetensors")
    assert [path.name for path in list_shards(tmp_path)] == ["a.safetensors"], "who opens a pipe waits for ever"


def test_a_damaged_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"half a sha")
    with pytest.raises(RecordError, match=r"a\.safetensors"):
        read_header(tmp_path / "a.safetensors")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    # A folder has the shard's name, so that writing fails even if root runs the test.
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError):
        write_shard(tmp_path / "a.safetensors", HEADER, some_records(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_writer_seals_full_shards_and_the_rest_at_the_end(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=4))
    for _ in range(5):
        writer.offer(some_records(2))
    writer.close()
    shards = list_shards(HEADER.folder(tmp_path))
    assert [len(read_shard(shard, [])) for shard in shards] == [4, 4, 2]
    assert writer.take_counts() == (10, 0)
    assert writer.take_counts() == (0, 0)


def test_a_lonely_record_is_sealed_when_it_is_old_enough(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(seal_after_s=0.1))
    writer.offer(some_records(1))
    deadline = time.monotonic() + 10
    while not list_shards(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list_shards(tmp_path)) == 1
    writer.close()


def test_the_oldest_shards_go_when_the_folder_is_over_its_budget(tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    write_shard(one, HEADER, some_records(4))
    size = one.stat().st_size
    one.unlink()
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=4, records_max_bytes=int(2.5 * size)))
    offered = [some_records(4) for _ in range(6)]
    for records in offered:
        writer.offer(records)
        time.sleep(0.05)  # so that modification times differ
    writer.close()
    left = [read_shard(shard, []).request.tolist() for shard in list_shards(tmp_path)]
    assert sorted(left) == sorted(records.request.tolist() for records in offered[-2:])


def test_a_clock_that_jumps_back_loses_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=2, records_max_age_s=3600))
    now, wait_until = time.time(), time.monotonic() + 10
    for count, jump_s in enumerate((0, -7200, -7200), start=1):
        monkeypatch.setattr("early_exit.handler.recording.writer.time.time", lambda jump_s=jump_s: now + jump_s)
        monkeypatch.setattr("early_exit.handler.recording.writer.time.time_ns",
                            lambda jump_s=jump_s: int(1e9 * (now + jump_s)))
        writer.offer(some_records(2))
        while len(list_shards(tmp_path)) < count and time.monotonic() < wait_until:
            time.sleep(0.01)
    writer.close()
    assert len(list_shards(tmp_path)) == 3
    assert writer.take_counts() == (6, 0)


def test_shards_beyond_the_age_limit_go(tmp_path: Path) -> None:
    old = HEADER.folder(tmp_path) / shard_name("2.0", 1, 1, 0)
    write_shard(old, HEADER, some_records(1))
    os.utime(old, (time.time() - 100, time.time() - 100))
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_max_age_s=50))
    writer.offer(some_records(1))
    writer.close()
    assert old not in list_shards(tmp_path)
    assert len(list_shards(tmp_path)) == 1


def test_records_that_cannot_be_written_are_counted_and_logged_once(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "digits").write_text("a file where the folder should be")
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=1))
    with caplog.at_level(logging.WARNING, logger="early_exit"):
        for _ in range(3):
            writer.offer(some_records(1))
        writer.close()
    assert writer.take_counts() == (0, 3)
    assert len([line for line in caplog.messages if "cannot write records" in line]) == 1


def test_writing_goes_on_once_the_folder_can_be_written_again(tmp_path: Path) -> None:
    blocker = tmp_path / "digits"
    blocker.write_text("")
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=1))
    writer.offer(some_records(1))
    deadline = time.monotonic() + 10
    dropped = 0
    while not dropped and time.monotonic() < deadline:
        dropped += writer.take_counts()[1]
    blocker.unlink()
    writer.offer(some_records(1))
    writer.close()
    assert (dropped, writer.take_counts()) == (1, (1, 0))


class SmallDisk:
    """A replacement for `write_shard` that fails as on a full disk until `is_full` is unset."""

    def __init__(self) -> None:
        self.is_full = True

    def __call__(self, path: Path, header: ShardHeader, records: Records) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard(path, header, records)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SmallDisk:
    small = SmallDisk()
    monkeypatch.setattr("early_exit.handler.recording.writer.write_shard", small)
    monkeypatch.setattr("early_exit.handler.recording.writer._RETRY_S", 0.05)
    return small


def test_what_a_full_disk_does_not_take_waits_in_memory_and_is_written_once_there_is_room(
        tmp_path: Path, disk: SmallDisk) -> None:
    began, writer = time.time(), RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=1))
    offered = [some_records(1) for _ in range(6)]
    for records in offered:
        writer.offer(records)
    time.sleep(0.2)
    assert writer.take_counts() == (0, 2), "four shards have room in memory"
    disk.is_full, full_until = False, time.time()
    deadline = time.monotonic() + 10
    while len(list_shards(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    writer.offer(some_records(1))
    writer.close()
    assert writer.take_counts() == (5, 0)
    shards = sorted(list_shards(tmp_path), key=lambda shard: int(shard.stem.split("-")[-1]))
    headers = [read_header(shard) for shard in shards]
    gaps = [header for header in headers if header.n_dropped]
    assert sum(header.n_dropped for header in gaps) == 2, "it is told what is missing, and when it was"
    assert all(began <= header.dropped[0] <= header.dropped[1] <= full_until for header in gaps)
    assert {header.host for header in headers} == {platform.node()}
    found = [int(read_shard(shard, []).request) for shard in shards]
    assert found[:4] == [int(records.request) for records in offered[:4]], "nothing is lost, and the order is kept"


def test_a_full_disk_is_told_once_a_minute_and_when_it_is_over(
        tmp_path: Path, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [1000.0]
    with caplog.at_level(logging.WARNING, logger="early_exit"):
        writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=1))
        writer.close()  # ends its thread, so that shards are sealed here, at the times given below
        monkeypatch.setattr("early_exit.handler.recording.writer.time.monotonic", lambda: now[0])
        for now[0] in (1000.0, 1030.0, 1059.0, 1061.0, 1100.0, 1130.0):
            writer._seal([some_records(1)])
        assert len([line for line in caplog.messages if "cannot write records" in line]) == 3
        disk.is_full = False
        writer._write_sealed()
    assert "are written" in caplog.messages[-1] and "after 130 s in which 0 records were dropped" in caplog.messages[-1]


def test_a_full_disk_is_known_by_what_the_library_says_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("early_exit.handler.recording.format.save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_shard(tmp_path / "a.safetensors", HEADER, some_records(1))
    assert raised.value.errno == errno.ENOSPC


def test_when_the_disk_does_not_keep_up_records_are_dropped_not_kept_in_memory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: object) -> None:
        time.sleep(0.5)

    monkeypatch.setattr("early_exit.handler.recording.writer.write_shard", slow)
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=2))
    for _ in range(20):
        writer.offer(some_records(2))
    dropped = writer.take_counts()[1]
    writer.close()
    assert dropped >= 28


def test_records_are_private_to_the_user(tmp_path: Path) -> None:
    write_shard(HEADER.folder(tmp_path / "records") / "a.safetensors", HEADER, some_records(1))
    assert (tmp_path / "records" / "digits" / "ab12").stat().st_mode & 0o077 == 0


def test_joining_shards_of_which_one_kept_no_bodies_gives_none() -> None:
    kept, not_kept = some_records(1, kept=[b"a"]), replace(some_records(1), kept=None)
    assert Records.concatenate([kept, not_kept]).kept is None
