"""State, locks and keys: links, pipes and files of other users are never used, and the umask makes no difference."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from early_exit.archiver.audit import Audit, audit_of
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_secret, read_token
from early_exit.archiver.watch.lock import only_watcher
from early_exit.handler.errors import EarlyExitError, ForeignFileError
from early_exit.handler.exits.risk import Risk
from early_exit.handler.files.private import open_private, private_folder, replacing
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor, read_state
from tests.support.foreign import SOMEBODY, give_away, open_to_others, open_umask
from tests.support.shadow_samples import samples_of

SECRET = "somebody's own words"
MONITORED = Monitored(Risk.DISAGREEMENT, 0.02, 0.05)


def lock(path: Path) -> None:
    with only_watcher(path):
        pass


USES: dict[str, Callable[[Path], object]] = {
    "the watch's lock": lock,
    "the audit, written": lambda path: Audit(path).append("noted"),
    "the audit, read": lambda path: Audit(path).read(),
    "the monitor's state": read_state,
    "TorchServe's keys": lambda path: read_token(path, "inference"),
    "the secret of TorchServe's workers": read_secret,
    "any file of ours": lambda path: open_private(path, "w"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_link_in_the_place_of_a_file_is_refused_and_what_it_leads_to_stays(
        use: Callable[[Path], object], tmp_path: Path) -> None:
    victim, place = tmp_path / "victim", tmp_path / "place"
    victim.write_text(SECRET)
    place.symlink_to(victim)
    with pytest.raises(EarlyExitError, match="place is a symbolic link"):
        use(place)
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_file_of_somebody_else_is_refused_as_it_is(
        use: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    place.write_text(json.dumps({**MonitorState().to_json(), "inference": {"key": "forged"}}))
    before = place.read_bytes()
    give_away(place, monkeypatch)
    with pytest.raises(EarlyExitError, match=r"belongs to user \d+, expected user \d+, who runs this, or root"):
        use(place)
    assert place.read_bytes() == before


@pytest.mark.parametrize("use", [USES["the audit, read"], USES["the monitor's state"], USES["TorchServe's keys"],
                                 USES["the secret of TorchServe's workers"]])
def test_a_pipe_in_the_place_of_a_file_is_refused_instead_of_waited_for(
        use: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "place")
    with pytest.raises(EarlyExitError, match="is no regular file"):
        use(tmp_path / "place")


@pytest.mark.parametrize(("name", "level"), [("monitor-1.0-ab.json", 1), ("monitor-1.0-ab.lock", 0)])
def test_a_worker_watches_alone_where_a_link_is_in_the_place_of_the_state_or_its_lock(
        name: str, level: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Instead of a state that it does not read, it takes the last level, at which nothing is left to watch."""
    victim = tmp_path / "victim"
    victim.write_text(SECRET)
    (tmp_path / name).symlink_to(victim)
    monitor = SharedMonitor(MONITORED, 1, tmp_path / "monitor-1.0-ab.json")
    with caplog.at_level(logging.WARNING, logger="early_exit"):
        monitor.note(samples_of([0.0]))
        monitor.close()
    assert (monitor.state.step, monitor.state.evidence.n) == (level, 1 - level), "it goes on"
    assert "is a symbolic link" in caplog.text
    assert victim.read_text() == SECRET


def test_a_link_in_the_place_of_what_is_written_anew_is_replaced_not_followed(tmp_path: Path) -> None:
    victim, place = tmp_path / "victim", tmp_path / "place"
    victim.write_text(SECRET)
    place.symlink_to(victim)
    with replacing(place) as scratch:
        scratch.write_text("ours")
    assert (victim.read_text(), place.read_text(), place.is_symlink()) == (SECRET, "ours", False)


def test_a_scratch_file_whose_name_was_guessed_is_not_written_into(tmp_path: Path) -> None:
    """Links under names that contain the process ID are never followed, since no scratch file has such a name."""
    victim = tmp_path / "victim"
    victim.write_text(SECRET)
    for guess in (f".state.json.{os.getpid()}", f"state.{os.getpid()}", "state.json.writing", "state.writing"):
        (tmp_path / guess).symlink_to(victim)
    with replacing(tmp_path / "state.json") as scratch:
        assert not scratch.is_symlink() and scratch.stat().st_mode & 0o777 == 0o600
        scratch.write_text("ours")
    assert victim.read_text() == SECRET


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    give_away(tmp_path / "run", monkeypatch)
    with pytest.raises(ForeignFileError, match="run belongs to user"), replacing(tmp_path / "run" / "plan.json"):
        pytest.fail("it was made there")


def test_a_server_is_not_started_in_a_folder_of_somebody_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "state").mkdir()
    give_away(tmp_path / "state", monkeypatch)
    with (pytest.raises(ForeignFileError, match="state belongs to user"),
          TorchServe(tmp_path / "store", tmp_path / "state", Addresses.free())):
        pytest.fail("it runs")
    assert list((tmp_path / "state").iterdir()) == []


def test_whatever_the_umask_folders_have_mode_0700_up_to_the_first_and_files_0600(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with open_umask():
        audit_of(tmp_path / "watch", "cifar").append("noted")
        share_state(tmp_path / "records" / "cifar" / "ab" / "monitor-1.0-ab.json")
        lock(private_folder(tmp_path / "store") / ".lock")
    assert open_to_others(tmp_path) == []
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4


def share_state(path: Path) -> None:
    monitor = SharedMonitor(MONITORED, 1, path)
    monitor.note(samples_of([0.0]))
    monitor.close()
    assert path.exists()


def test_a_file_of_root_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file may come from an administrator or from a Kubernetes volume."""
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)
    with open_private(Path("/etc/passwd"), "r") as file:
        assert file.read()
