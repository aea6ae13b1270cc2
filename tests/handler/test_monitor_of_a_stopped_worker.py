"""A worker that is stopped while it holds the lock of the monitor's state, or whose disk hangs, stops no other one."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor import shared_state
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.shared_state import SharedMonitor, read_state
from tests.support.shadow_samples import samples_of
from tests.support.waiting import wait_until

MONITORED = Monitored(Risk.DISAGREEMENT, 0.02, 0.05)


def _stop_with_the_lock(path: Path) -> None:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.kill(os.getpid(), signal.SIGSTOP)


@contextmanager
def stopped_worker(path: Path) -> Iterator[None]:
    """Run the block while a stopped process holds the lock of a monitor's state."""
    process = multiprocessing.get_context("fork").Process(target=_stop_with_the_lock, args=(path.with_suffix(".lock"),))
    process.start()
    assert process.pid is not None
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join()


def test_while_a_stopped_worker_holds_the_lock_the_others_watch_alone_say_so_once_and_share_afterwards(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "monitor.json"
    with stopped_worker(path):
        alone = SharedMonitor(MONITORED, 3, path)
        alone.note(samples_of([1.0] * 2))
        wait_until(lambda: alone.state.step == 1, "the alarm of the worker alone", limit_s=20)
        alone.note(samples_of([0.0] * 5, level=1))
        wait_until(lambda: alone.state.evidence.n == 5, "samples of the next level", limit_s=20)
        assert not path.exists()
        assert len([line for line in caplog.messages if "Was a worker stopped?" in line]) == 1
    wait_until(path.exists, "the shared state", limit_s=20)
    alone.close()
    assert read_state(path) == alone.state
    assert (alone.state.step, len(alone.state.alarms), alone.state.evidence.n) == (1, 1, 5)


def test_a_worker_closes_while_a_stopped_one_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "monitor.json"
    with stopped_worker(path):
        worker = SharedMonitor(MONITORED, 3, path)
        worker.note(samples_of([0.0] * 5))
        worker.close()
        assert worker.state.evidence.n == 5 and not path.exists()


def test_a_worker_closes_while_its_disk_does_not_answer(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    answers = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor: answers.wait())
    monkeypatch.setattr(shared_state, "_CLOSING_FOR_S", 0.1)
    monkeypatch.setattr(shared_state, "_MOST_QUEUED", 3)
    worker = SharedMonitor(MONITORED, 3, tmp_path / "monitor.json")
    worker.note(samples_of([0.0]))
    worker.close()
    assert "does the disk answer?" in caplog.text
    for _ in range(10):
        worker.note(samples_of([0.0]))
    answers.set()
    worker.close()
    assert 1 <= worker.state.evidence.n <= 5, "what waits for the disk is bounded"
