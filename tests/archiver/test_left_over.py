"""A failed renewal leaves nothing behind, and records do not outlive their limits even while no worker runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from early_exit.archiver.audit import Event
from early_exit.archiver.control import RunSettings, VersionStatus
from early_exit.archiver.packaging import archive as packaging
from early_exit.archiver.packaging.publish import zip_folder
from early_exit.archiver.watch.left_over import remove_left_over
from early_exit.archiver.watch.triggers import Terms
from early_exit.archiver.watch.watched import Watched
from early_exit.archiver.watch.watcher import Watcher
from early_exit.handler.archive_layout import HANDLER, ArchiveLayout
from early_exit.handler.errors import ServerError
from early_exit.handler.recording.retention import shard_name
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from tests.support.recording import record
from tests.support.residual import recorded_inputs, residual_backbone
from tests.support.server_in_memory import ServerInMemory

OPTIONS = TrainingOptions(tolerance=0.05, measure="flops", search=None, recipe=Distillation(epochs=10))
CONFIG = "early_exit: {records_max_age_s: 5000}\n"


class ServerThatIsDown(ServerInMemory):
    def versions(self, model: str) -> list[VersionStatus]:
        raise ServerError("no answer")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model store, whose archive has no exits, and with records of that archive."""
    folder, backbone = tmp_path_factory.mktemp("made"), residual_backbone()
    layout = ArchiveLayout(folder / "archive")
    layout.folder.mkdir(parents=True)
    backbone.save(layout.folder)
    model = {"modelName": "digits", "modelVersion": "2.0"}
    layout.original_manifest.write_text(json.dumps({"model": {**model, "handler": "no_such_handler"}}))
    layout.manifest.parent.mkdir()
    layout.manifest.write_text(json.dumps({"model": {**model, "handler": HANDLER, "configFile": "model-config.yaml"}}))
    (layout.root / "model-config.yaml").write_text(CONFIG)
    (folder / "store").mkdir()
    zip_folder(layout.root, folder / "store" / "digits-2.0.mar")
    record(backbone, recorded_inputs(), folder / "records", name="digits")
    return folder


@pytest.fixture
def watched(made: Path, tmp_path: Path) -> Iterator[Watched]:
    shutil.copytree(made / "store", tmp_path / "store")
    server = ServerInMemory("server", tmp_path / "store")
    server.register("digits-2.0.mar", RunSettings())
    with mock.patch.object(packaging, "check", return_value={}):  # the archive has no handler to try out
        yield Watched("digits", [server], tmp_path / "store", [str(made / "records")], tmp_path / "watch",
                      lambda archive: OPTIONS, None, Terms(0.05, 0.05, 30 * 24 * 3600.0), trial_samples=30,
                      longest_batch_s=0.0)


def events(watched: Watched) -> list[str]:
    return [event["event"] for event in watched.audit.read()]


def test_a_training_that_fails_again_and_again_leaves_no_run_and_no_copy_of_the_records(watched: Watched) -> None:
    nowhere = replace(OPTIONS, measure="seconds", measure_device="nowhere")
    watcher = Watcher(replace(watched, options=lambda archive: nowhere))
    mine = watched.state / "runs" / "mine"
    mine.mkdir(parents=True)
    for _ in range(2):
        watcher.tick()
        assert list(watched.state.rglob("*.npy")), "the next try goes on with it"
    watcher.tick()
    assert events(watched) == ["attempt", "trouble", "attempt", "attempt"]
    assert list((watched.state / "runs").iterdir()) == [mine]
    assert [mar.name for mar in watched.store.iterdir()] == ["digits-2.0.mar"]


def test_a_roll_that_fails_again_and_again_leaves_no_version_no_archive_and_no_copy_of_the_records(
        watched: Watched) -> None:
    [server] = watched.servers
    assert isinstance(server, ServerInMemory)
    server.probe_error = "wrong answer"
    watcher = Watcher(watched)
    for _ in range(5):
        watcher.tick()
    assert events(watched) == ["attempt", *["rolling", "roll failed"] * 3, "given up"], watched.audit.read()[-1]
    assert list(server.registered) == ["2.0"] and server.default == "2.0"
    assert [mar.name for mar in watched.store.iterdir()] == ["digits-2.0.mar"]
    [run] = (watched.state / "runs").iterdir()
    assert RunPaths(run).plan.exists() and not list(run.rglob("*.npy"))


def test_records_that_are_too_old_go_though_no_server_runs(watched: Watched, tmp_path: Path) -> None:
    folder = tmp_path / "records" / "digits" / "ab12"
    folder.mkdir(parents=True)
    old, new, foreign = (folder / name for name in (shard_name("2.0", 1, 1, 0), shard_name("2.0", 1, 2, 1), "mine"))
    for path, age_s in ((old, 6000), (new, 4000), (foreign, 6000)):
        path.write_bytes(b"0")
        os.utime(path, (time.time() - age_s, time.time() - age_s))
    Watcher(replace(watched, servers=[ServerThatIsDown("server", watched.store)],
                    sources=[str(tmp_path / "records")])).tick()
    assert events(watched) == ["trouble"]
    assert sorted(folder.iterdir()) == sorted([new, foreign])


def test_of_a_run_that_was_cut_off_for_good_nothing_stays_and_folders_with_other_names_do(tmp_path: Path) -> None:
    """However the watcher ended, the audit shows at its next look what has to be removed."""
    names = ("20260101-000000", "20260102-000000", "20260103-000000", "20260104-000000", "mine", "20260101")
    for name in names:
        RunPaths(tmp_path / name).training_set.root.mkdir(parents=True)
        RunPaths(tmp_path / name).plan.write_text("{}")
    (tmp_path / "20260105-000000").symlink_to(tmp_path / "mine")
    audit: list[Event] = [
        {"event": "attempt", "run": names[0]}, {"event": "attempt", "run": names[1]}, {"event": "kept", "new": {}},
        {"event": "attempt", "run": names[2]}, {"event": "kept", "why": "too few records"},
        {"event": "attempt", "run": names[3]}]
    remove_left_over(tmp_path, audit, unfinished=names[3])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "20260101", names[1], names[3], "20260105-000000", "mine"]
    assert {name for name in names if RunPaths(tmp_path / name).training_set.root.exists()} == {
        names[3], "mine", "20260101"}
