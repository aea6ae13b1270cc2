"""Setting the clock while records are written neither deletes shards nor changes the order of records."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.handler.recording import clock
from early_exit.handler.recording.clock import SharedClock, in_order
from early_exit.handler.recording.format import ShardHeader
from early_exit.handler.recording.retention import enforce_limits, shard_name

DAY = 86400.0
HEADER = ShardHeader("digits", "2.0", "ab12", 4, ("layer1",))

STEPS = st.lists(st.floats(0.0, 600.0), min_size=1, max_size=60)
JUMPS = st.floats(DAY, 400 * DAY) | st.floats(-400 * DAY, -DAY)


@given(STEPS)
def test_times_of_a_clock_that_nobody_sets_stay_as_they_are(steps: list[float]) -> None:
    times = [1.7e9 + since for since in accumulate(steps)]
    assert in_order(times) == times


@given(STEPS, JUMPS, st.data())
def test_a_jump_there_and_back_is_taken_out(steps: list[float], jump: float, data: st.DataObject) -> None:
    times = [1.7e9 + since for since in accumulate(steps)]
    first = data.draw(st.integers(0, len(times) - 1))
    last = data.draw(st.integers(first, len(times)))
    seen = [*times[:first], *(moment + jump for moment in times[first:last]), *times[last:]]
    corrected = in_order(seen)
    assert all(later >= earlier for earlier, later in pairwise(corrected))
    n_before, n_jumped, n_after = first, last - first, len(times) - last
    if n_before and n_jumped < (n_after if jump > 0 else n_before):  # only then can it be told which times are right
        assert corrected[:first] == times[:first] and corrected[last:] == times[last:]
        assert all(moment == times[first - 1] for moment in corrected[first:last])


def test_a_little_disorder_is_no_jump() -> None:
    times = [100.0, 100.4, 100.1, 100.9, 95.0]
    assert in_order(times) == times


def shard(folder: Path, number: int, age_s: float, *, began: int = 17, now: float | None = None) -> Path:
    path = HEADER.folder(folder) / shard_name("2.0", 4711, began, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"0" * 100)
    written = (now or time.time()) - age_s
    os.utime(path, (written, written))
    return path


def left(folder: Path) -> int:
    return len(list(HEADER.folder(folder).iterdir()))


def test_a_clock_that_jumps_ahead_while_a_worker_runs_deletes_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = time.time()
    for number in range(5):
        shard(tmp_path, number, age_s=600.0 * (5 - number))
    monkeypatch.setattr(clock.time, "time", lambda: right + 40 * DAY)
    shard(tmp_path, 5, age_s=0.0, now=right + 40 * DAY)
    enforce_limits(tmp_path, "digits", 30 * DAY, 2**30)
    assert left(tmp_path) == 6
    monkeypatch.setattr(clock.time, "time", lambda: right + 60.0)
    shard(tmp_path, 6, age_s=0.0, now=right + 60)
    enforce_limits(tmp_path, "digits", 30 * DAY, 2**30)
    assert left(tmp_path) == 7


@pytest.fixture
def in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that deletes old shards as a new process would whose clock is some seconds ahead."""
    right = time.time

    def delete(ahead_s: float) -> None:
        monkeypatch.setattr(clock.time, "time", lambda: right() + ahead_s)
        began = importlib.util.module_from_spec(clock.__spec__)
        clock.__spec__.loader.exec_module(began)
        monkeypatch.setattr("early_exit.handler.recording.retention.SharedClock", began.SharedClock)
        enforce_limits(tmp_path, "digits", 30 * DAY, 2**30)
        monkeypatch.setattr(clock.time, "time", right)

    return delete


def test_a_clock_that_is_set_right_after_a_process_began_is_believed_a_day_later(
        monkeypatch: pytest.MonkeyPatch) -> None:
    right, booted = time.time(), clock._since_boot()
    passed = [0.0]
    monkeypatch.setattr(clock, "_since_boot", lambda: booted + passed[0])
    monkeypatch.setattr(clock.time, "time", lambda: 1000.0 + passed[0])
    process = clock.ProcessClock()
    monkeypatch.setattr(clock.time, "time", lambda: right + passed[0])
    for passed[0] in (10.0, 3600.0, DAY):
        assert process.now() == pytest.approx(1000.0 + passed[0]), "it may be set back again"
    passed[0] = DAY + 20.0
    assert process.now() == right + passed[0] == process.now()


def test_a_worker_that_is_started_while_the_clock_is_ahead_deletes_nothing_either(
        tmp_path: Path, in_another_process: Callable[[float], None]) -> None:
    for number in range(3):
        shard(tmp_path, number, age_s=600.0)
    in_another_process(0.0)
    in_another_process(40 * DAY)
    shard(tmp_path, 0, began=18, age_s=-40 * DAY)
    in_another_process(40 * DAY + 3600)
    assert left(tmp_path) == 4
    in_another_process(7200.0)
    assert left(tmp_path) == 4


def test_where_nobody_noted_the_clock_yet_it_is_not_believed_far_ahead_of_the_newest_shard(
        tmp_path: Path, in_another_process: Callable[[float], None]) -> None:
    for number in range(3):
        shard(tmp_path, number, age_s=600.0)
    in_another_process(40 * DAY)
    in_another_process(40 * DAY + 3600)
    assert left(tmp_path) == 3, "the first worker after an update began while the clock was ahead"
    in_another_process(41 * DAY + 60)
    assert left(tmp_path) == 0


def test_after_a_pause_of_weeks_what_is_too_old_goes_within_a_day(
        tmp_path: Path, in_another_process: Callable[[float], None]) -> None:
    shard(tmp_path, 0, age_s=600.0)
    in_another_process(0.0)
    for passed in (40 * DAY, 40 * DAY + 3600, 41 * DAY - 3600):
        in_another_process(passed)
        assert left(tmp_path) == 1
    in_another_process(41 * DAY + 60)
    assert left(tmp_path) == 0


def test_in_a_folder_that_nobody_has_looked_after_yet_the_clock_is_believed(tmp_path: Path) -> None:
    shard(tmp_path, 0, age_s=31 * DAY)
    shard(tmp_path, 1, age_s=0.0)
    enforce_limits(tmp_path, "digits", 30 * DAY, 2**30)
    assert left(tmp_path) == 1


def test_a_shard_that_was_dated_ahead_goes_with_its_neighbours(tmp_path: Path) -> None:
    ages = (33 * DAY, 32.5 * DAY, -40 * DAY, 32 * DAY, 31 * DAY)
    for number, age_s in enumerate(ages):
        shard(tmp_path, number, age_s)
    shard(tmp_path, 0, age_s=0.0, began=18)
    enforce_limits(tmp_path, "digits", 30 * DAY, 2**30)
    assert left(tmp_path) == 1, "the third was written between the second and the fourth"


@pytest.mark.parametrize("content", ["", "[]", '{"time": "now"}', '{"time": NaN}', "{}"])
def test_a_damaged_note_about_the_clock_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "clock.json").write_text(content)
    assert SharedClock(tmp_path).now() == pytest.approx(time.time(), abs=5)
    assert json.loads((tmp_path / "clock.json").read_text())["time"] == pytest.approx(time.time(), abs=5)


def test_a_folder_that_cannot_be_written_still_tells_the_time(tmp_path: Path) -> None:
    assert SharedClock(tmp_path / "missing").now() == pytest.approx(time.time(), abs=5)
    assert not (tmp_path / "missing").exists()
