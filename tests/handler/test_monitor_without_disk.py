"""While the disk is full, read-only or damaged, the monitor forgets no alarm and goes back to no lower level."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor import shared_state
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import Alarm, MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor, read_state
from tests.support.foreign import give_away
from tests.support.shadow_samples import samples_of
from tests.support.waiting import wait_until

MONITORED = Monitored(Risk.DISAGREEMENT, 0.02, 0.05)


class Disk:
    """A disk that can be full: then nothing is written, and reading still works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full, self.n_refused, self._real = False, 0, shared_state.replacing
        monkeypatch.setattr(shared_state, "replacing", self._replacing)

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        if self.is_full:
            self.n_refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        with self._real(path) as scratch:
            yield scratch

    def refuse(self, times: int) -> None:
        """Wait until the full disk has refused a number of further writes."""
        before = self.n_refused
        wait_until(lambda: self.n_refused >= before + times, f"{times} refused writes", limit_s=10)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def written(path: Path) -> MonitorState:
    state = read_state(path)
    assert state is not None
    return state


def certified(path: Path) -> SharedMonitor:
    """Return a worker that has shared 100 right answers."""
    worker = SharedMonitor(MONITORED, 3, path)
    worker.note(samples_of([0.0] * 100))
    wait_until(lambda: path.exists() and written(path).evidence.n == 100, "100 shared samples", limit_s=10)
    return worker


@pytest.mark.parametrize("n_later", [0, shared_state._MOST_UNSHARED + 1])
def test_an_alarm_on_a_full_disk_outlasts_quiet_seconds_and_is_written_when_the_disk_is_mended(
        n_later: int, disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "monitor.json"
    worker = certified(path)
    disk.is_full = True
    worker.note(samples_of([1.0] * 30))
    wait_until(lambda: worker.state.step == 1, "the alarm", limit_s=10)
    worker.note(samples_of([0.0] * n_later, level=1))
    disk.refuse(3)
    assert (worker.state.step, len(worker.state.alarms), worker.state.evidence.n) == (1, 1, n_later)
    disk.is_full = False
    wait_until(lambda: written(path).step == 1, "the alarm in the file", limit_s=10)
    worker.close()
    assert written(path).alarms == worker.state.alarms and written(path).evidence.n == n_later
    assert len([line for line in caplog.messages if "ALARM" in line]) == 1


def test_an_alarm_that_was_raised_alone_stays_though_others_saw_many_right_answers_meanwhile(
        tmp_path: Path) -> None:
    """Added to the evidence of the others, the samples of this worker would raise no alarm."""
    folder = tmp_path / "model"
    path = folder / "monitor.json"
    alone = SharedMonitor(MONITORED, 3, path)
    folder.write_text("a file where the folder should be")
    alone.note(samples_of([1.0] * 2))
    wait_until(lambda: alone.state.step == 1, "the alarm", limit_s=10)
    folder.unlink()
    others = SharedMonitor(MONITORED, 3, path)
    others.note(samples_of([0.0] * 1000))
    others.close()
    alone.close()
    assert alone.state.step == written(path).step == 1
    assert len(written(path).alarms) == 1


def test_a_file_with_a_lower_level_is_not_followed_and_gets_the_alarms_of_the_worker(tmp_path: Path) -> None:
    """For example, somebody restores the file from a backup."""
    path = tmp_path / "monitor.json"
    worker = certified(path)
    backup = path.read_text()
    worker.note(samples_of([1.0] * 30))
    wait_until(lambda: written(path).step == 1, "the alarm in the file", limit_s=10)
    path.write_text(backup)
    worker.note(samples_of([0.0], level=1))
    worker.close()
    assert (worker.state.step, written(path).step, len(written(path).alarms)) == (1, 1, 1)


@pytest.mark.parametrize("damaged", ["", '{"format": 1, "st', '{"format": 1}'])
def test_a_state_that_is_damaged_at_start_is_replaced_by_one_without_exits(
        damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The damaged file may have held an alarm."""
    path = tmp_path / "monitor.json"
    path.write_text(damaged)
    worker = SharedMonitor(MONITORED, 3, path)
    assert worker.state.step == written(path).step == 3
    assert [alarm.n for alarm in written(path).alarms] == [0], "whoever reads the state must learn of it"
    assert "delete this file" in caplog.text and "ALARM" not in caplog.text
    worker.note(samples_of([0.0] * 5))
    worker.close()
    restarted = SharedMonitor(MONITORED, 3, path)
    restarted.close()
    assert restarted.state.step == 3, "it does not become level 0 by a restart"
    path.unlink()
    anew = SharedMonitor(MONITORED, 3, path)
    anew.close()
    assert anew.state == MonitorState()


def test_a_worker_says_of_a_state_that_another_one_could_not_read_that_it_is_lost(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "monitor.json"
    healthy = certified(path)
    path.write_text("")
    SharedMonitor(MONITORED, 3, path).close()
    caplog.clear()
    wait_until(lambda: healthy.state.step == 3, "the last level", limit_s=10)
    healthy.close()
    assert "ALARM" not in caplog.text
    [line] = [line for line in caplog.messages if "a worker of this version could not read" in line]
    assert f"state in {path}" in line and "fallback level 3 of 3" in line


@pytest.mark.parametrize("is_lost_first", [False, True])
def test_of_a_lost_state_and_an_alarm_of_samples_the_alarm_is_kept_with_the_earlier_time(is_lost_first: bool) -> None:
    lost, raised = Alarm(0, 100.0, 0, 0.0, 0.0), Alarm(0, 200.0, 30, 0.5, 21.0)
    if not is_lost_first:
        lost, raised = replace(lost, time=200.0), replace(raised, time=100.0)
    for own, read in ((lost, raised), (raised, lost)):
        merged = shared_state.merged(MonitorState(3, alarms=(own,)), MonitorState(3, alarms=(read,)))
        assert merged.alarms == (replace(raised, time=100.0),)


def test_the_alarm_of_a_worker_that_cannot_read_the_state_hides_no_alarm_of_samples(tmp_path: Path) -> None:
    path = tmp_path / "monitor.json"
    worker = certified(path)
    worker.note(samples_of([1.0] * 30))
    wait_until(lambda: written(path).step == 1, "the alarm in the file", limit_s=10)
    path.write_text("")
    restarted = SharedMonitor(MONITORED, 3, path)
    worker.note(samples_of([0.0], level=1))
    worker.close()
    restarted.close()
    assert (worker.state.step, written(path).step) == (3, 3)
    assert [alarm.n > 0 for alarm in written(path).alarms] == [True]


def test_a_state_of_somebody_else_is_left_as_it_is_and_the_worker_starts_without_exits(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "monitor.json"
    certified(path).close()
    before = path.read_bytes()
    give_away(path, monkeypatch)
    worker = SharedMonitor(MONITORED, 3, path)
    worker.note(samples_of([0.0]))
    worker.close()
    assert (worker.state.step, path.read_bytes()) == (3, before)


def test_a_state_that_is_damaged_while_a_worker_serves_is_replaced_by_what_the_worker_knows(tmp_path: Path) -> None:
    path = tmp_path / "monitor.json"
    worker = certified(path)
    path.write_text("")
    worker.note(samples_of([0.0] * 5))
    worker.close()
    assert (written(path).step, written(path).evidence.n) == (0, 105)


def test_a_state_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, bool]] = []
    path, real = tmp_path / "monitor.json", os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    worker = SharedMonitor(MONITORED, 3, path)
    worker.note(samples_of([0.0]))
    worker.close()
    assert synced == [(path.stat().st_size, False)]
