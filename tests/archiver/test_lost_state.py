"""What `ee-watch` does and says after a worker could not read its monitor's state, which may have held an alarm."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from early_exit.archiver.watch.cli import main
from early_exit.archiver.watch.status import ModelStatus, _monitors
from early_exit.archiver.watch.watcher import Watcher
from early_exit.handler.errors import RecordError
from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor, monitor_file, read_state
from tests.archiver.test_renewal import BACKBONE, SERVED, START, WatcherOfSights, decisions, rolled, seen, watcher

__all__ = ["rolled", "watcher"]  # the fixtures


def lost(tmp_path: Path, second: float) -> MonitorState:
    """Return the state of a worker that found a damaged state, with the time at which it did."""
    path = tmp_path / "monitor.json"
    path.write_text("damaged")
    with mock.patch("time.time", lambda: START + second):
        SharedMonitor(Monitored(Risk.DISAGREEMENT, 0.02, 0.05), 3, path).close()
    state = read_state(path)
    assert state is not None
    return state


def test_the_plan_is_renewed_on_records_from_after_the_loss(
        watcher: WatcherOfSights, rolled: list[str], tmp_path: Path) -> None:
    state = lost(tmp_path, 3000)
    watcher.sight = seen(3500, state)
    watcher.tick()
    assert not decisions(watcher), "too few since"
    watcher.sight = seen(4200, state)
    watcher.tick()
    attempt, rolling = watcher._watched.audit.read()[:2]
    assert (attempt["reason"], attempt["certify_after"]) == ("lost state", START + 3000)
    assert "its monitor's state is lost" in rolling["why"] and len(rolled) == 1


def test_a_version_on_trial_that_loses_its_state_is_taken_back(watcher: WatcherOfSights, tmp_path: Path) -> None:
    watcher.tick()
    watcher.sight = seen(3000, lost(tmp_path, 2500), version="3.0")
    watcher.tick()
    assert [event for event, _ in decisions(watcher)][-2:] == ["taking back", "rolled back"]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_status_says_that_the_state_is_lost_and_what_to_do(
        as_json: bool, watcher: WatcherOfSights, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificate = certificate_of(seen(3000, lost(tmp_path, 2500)), tmp_path, capsys, as_json=as_json)
    assert "not known since" in certificate and "could not read the monitor's state" in certificate
    assert "answers without exits until" in certificate and "deleted the file" in certificate
    assert "at most" in certificate_of(seen(3000, MonitorState()), tmp_path, capsys, as_json=as_json)


def certificate_of(status: ModelStatus, state: Path, capsys: pytest.CaptureFixture[str], *, as_json: bool) -> str:
    """Return what `ee-watch status` prints about the certificate."""
    with mock.patch.object(Watcher, "look", lambda self: status):
        assert main(["status", "digits", "--state", str(state), *(["--json"] if as_json else [])]) == 0
    told = capsys.readouterr().out
    facts = json.loads(told) if as_json else dict(line.split("  ", 1) for line in told.splitlines())
    certificate: str = facts["certificate"]
    return certificate


@pytest.mark.parametrize("content", ["damaged", json.dumps({**MonitorState().to_json(), "format": 999})])
def test_a_state_that_the_watcher_itself_cannot_read_is_an_error_that_says_what_to_do(
        content: str, tmp_path: Path) -> None:
    path = monitor_file(tmp_path / "digits" / BACKBONE.sha256, "2.0", SERVED)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(RecordError, match=rf"{path}: .* not known whether the certificate holds, .* delete the file"):
        _monitors([tmp_path], "digits", "2.0", BACKBONE, SERVED)
