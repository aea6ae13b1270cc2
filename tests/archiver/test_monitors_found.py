"""Where `ee-watch` finds the states of the monitor, and which of them it counts."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from early_exit.archiver.packaging.publish import zip_folder
from early_exit.archiver.watch.cli import _certificate
from early_exit.archiver.watch.trial import has_passed, why_unseen
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit, save_plan
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor.blocks import Sample
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import MONITOR_FILES, watch
from early_exit.handler.recording.format import ShardHeader
from early_exit.training.data.traffic import traffic_of
from tests.archiver.test_watched_records import N, looked, shard_of
from tests.archiver.test_watched_records import store as store_without_plan
from tests.support.residual import residual_backbone

__all__ = ["store_without_plan"]  # the fixture
VERSION, MAR = "2.0", "digits-2.0.mar"


@pytest.fixture
def store(store_without_plan: Path, tmp_path: Path) -> Path:
    """A model store with an archive that has a certified plan with an exit."""
    layout, backbone = ArchiveLayout(tmp_path / "archive"), residual_backbone().description
    layer = backbone.candidates[0]
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 300, 0, 0.0, 0.01, "x", (0.0, 1.0), 300, 300)
    planned = PlannedExit(layer.path, HeadSpec(widths=()), ConfidencePolicy(0.2, 0.5), layer.cost, 0.01)
    head = Head(HeadSpec(widths=()), layer.shape, backbone.n_classes)
    save_plan(layout.folder, ExitPlan(backbone.sha256, "certified", (planned,), certificate), {layer.path: head})
    zip_folder(layout.root, store_without_plan / MAR)
    return store_without_plan


def served(store: Path, folder: Path, loss: float, n: int = 200, name: str = "digits") -> MonitorState:
    """Let a worker of the archive in the store see samples with a loss, and record; return its monitor's state."""
    contents = read_archive(store / MAR)
    header = ShardHeader(name, VERSION, contents.description.sha256, None, ())
    monitor = watch(contents.plan, header.folder(folder), VERSION)
    assert monitor is not None
    monitor.note([Sample(0, loss, content, time.time()) for content in range(n)])
    monitor.close()
    if name == "digits":
        shard_of(folder, traffic_of(contents), version=VERSION)
    return monitor.state


@pytest.mark.parametrize("part", [
    "", "host/digits", "host/digits/BACKBONE", "copy", "link", "other/.."])
def test_an_alarm_is_found_wherever_the_records_are(part: str, store: Path, tmp_path: Path) -> None:
    root = tmp_path / "shared"
    state = served(store, root / "host", 1.0)
    [state_file] = root.rglob(MONITOR_FILES)
    assert state.alarms
    shutil.copytree(root / "host" / "digits", tmp_path / "elsewhere" / "copy")  # as a copy of a part of a bucket is
    (root / "other").mkdir()
    (root / "link").symlink_to(root / "host" / "digits")
    place = root / part.replace("BACKBONE", state_file.parent.name)
    records = tmp_path / "elsewhere" / "copy" if part == "copy" else place
    status = looked(store, records, [])
    assert len(status.times) == N and status.alarm_times == tuple(alarm.time for alarm in state.alarms)
    assert _certificate(status).startswith("void since")


def test_the_monitor_of_another_model_with_the_same_archive_is_not_this_ones(store: Path, tmp_path: Path) -> None:
    served(store, tmp_path / "records", 0.0, 10)
    served(store, tmp_path / "records", 1.0, 200, "photos")
    status = looked(store, tmp_path, [])
    assert status.n_watched == 10 and not status.alarm_times


def test_records_without_the_monitors_state_are_no_sign_that_the_certificate_holds(store: Path, tmp_path: Path) -> None:
    served(store, tmp_path / "records", 0.0)
    holds = looked(store, tmp_path / "records", [])
    assert why_unseen(holds) is None and _certificate(holds).startswith("With 95% confidence")
    [state] = (tmp_path / "records").rglob(MONITOR_FILES)
    state.unlink()
    status = looked(store, tmp_path / "records", [])
    assert "an alarm would not be seen: pass the records folders" in (why_unseen(status) or "")
    assert _certificate(status).startswith("not known: there are records of digits 2.0")


def test_before_a_version_has_made_records_its_monitor_is_not_missed(store: Path, tmp_path: Path) -> None:
    shard_of(tmp_path / "records", traffic_of(read_archive(store / MAR)), version="1.0")
    assert why_unseen(looked(store, tmp_path / "records", [])) is None


def test_a_mirror_of_a_host_brings_no_samples_also_if_it_lags_behind(store: Path, tmp_path: Path) -> None:
    host, mirror, lagging = (tmp_path / name for name in ("host", "mirror", "lagging"))
    served(store, host, 0.0, 100)
    shutil.copytree(host, lagging)
    served(store, host, 0.0, 60)
    shutil.copytree(host, mirror)
    alone = looked(store, host, [])
    for folders in ([host, mirror, lagging], [lagging, host], [tmp_path, mirror]):
        status = looked(store, folders[0], [], *folders[1:])
        assert (status.n_watched, status.n_tested) == (160, alone.n_tested)
        assert not has_passed(status, 300)


def test_an_alarm_that_only_the_mirror_still_has_counts(store: Path, tmp_path: Path) -> None:
    state = served(store, tmp_path / "host", 1.0)
    shutil.copytree(tmp_path / "host", tmp_path / "mirror")
    [path] = (tmp_path / "host").rglob(MONITOR_FILES)
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 0, "alarms": []}))
    assert looked(store, tmp_path / "host", [], tmp_path / "mirror").alarm_times == tuple(
        alarm.time for alarm in state.alarms)


def test_the_samples_of_two_hosts_count_together(store: Path, tmp_path: Path) -> None:
    for host in ("one", "two"):
        served(store, tmp_path / host, 0.0, 160)
    assert looked(store, tmp_path / "one", [], tmp_path / "two").n_watched == 320


def test_a_copied_state_of_an_earlier_version_counts_once(store: Path, tmp_path: Path) -> None:
    served(store, tmp_path / "host", 0.0, 160)
    [path] = (tmp_path / "host").rglob(MONITOR_FILES)
    state = json.loads(path.read_text())
    assert state.pop("origin")
    path.write_text(json.dumps(state))
    shutil.copytree(tmp_path / "host", tmp_path / "mirror")
    assert looked(store, tmp_path / "host", [], tmp_path / "mirror").n_watched == 160
