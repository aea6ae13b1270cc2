"""Which commands run the code of an archive, and which environment variables that code sees."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from early_exit.archiver.control import RunSettings
from early_exit.archiver.gateway.certificates import Promises
from early_exit.archiver.packaging.cli import main as ee_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.tryout.trials import check
from early_exit.archiver.watch import cli as watching
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.protocol import RECORDS_VARIABLE
from early_exit.training.cli import main as ee_train
from early_exit.training.paths import RunPaths
from early_exit.training.report.evaluate import evaluate
from tests.archiver.test_roll import rolled, serving
from tests.support.digits import batches, traffic
from tests.support.plans import write_plan
from tests.support.recording import record
from tests.support.rewritten import rewritten
from tests.support.untried import build_untried

N_RECORDS = 192
CODE = ("digits_handler.py", "digits_resnet.py", "early_exit/handler/service.py")
"""The files of an archive that a worker imports by name: the user's handler and model, and the copy of our service."""
SECRETS = {"AWS_SECRET_ACCESS_KEY": "a", "HTTPS_PROXY": "http://me:secret@proxy", "EE_GATEWAY_TOKEN": "b",
           "GITHUB_TOKEN": "c", RECORDS_VARIABLE: "/records"}
TRAINING = ["--search", "none", "--thresholds", "paper", "--cost", "flops", "--layers", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which each module of the archive that runs writes the environment variables that it sees."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def store(recorder_mar: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with digits 2.0 and digits 3.0. Version 3.0 has exits, and its code reports that it was run."""
    folder, plain = tmp_path_factory.mktemp("coded"), tmp_path_factory.mktemp("plain")
    plan = write_plan(plain / "run", recorder_mar)
    tell = ("\nimport json, os, pathlib\n"
            f"pathlib.Path({str(made)!r}, __name__).write_text(json.dumps(dict(os.environ)))\n")
    shutil.copy(recorder_mar, folder)
    mar = build_untried(ArchiveRequest(str(recorder_mar), plain, plan=plan))
    rewritten(mar, folder / mar.name, **{name: lambda text: text + tell for name in CODE})
    return folder


@pytest.fixture(scope="module")
def records(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout, folder = ArchiveLayout(tmp_path_factory.mktemp("unpacked")), tmp_path_factory.mktemp("records")
    extract(recorder_mar, layout.root)
    requests = traffic(N_RECORDS, seed=7)
    [inputs] = batches(requests, N_RECORDS)
    record(load_backbone(layout.folder), inputs, folder, name="digits", bodies=[request.body for request in requests])
    return folder


@pytest.fixture(autouse=True)
def nothing_made(made: Path) -> None:
    for file in made.iterdir():
        file.unlink()


def told(made: Path) -> dict[str, dict[str, str]]:
    """Return the environment variables that each module of the archive saw. A module that did not run has no entry."""
    return {file.name: json.loads(file.read_text()) for file in made.iterdir()}


def test_describing_an_archive_runs_none_of_its_code(store: Path, made: Path) -> None:
    assert ee_archive(["show", str(store / "digits-3.0.mar")]) == 0
    assert told(made) == {}


def test_rolling_an_archive_in_runs_none_of_its_code_here(store: Path, made: Path) -> None:
    assert rolled(serving("server", store), store / "digits-3.0.mar").version == "3.0"
    assert told(made) == {}


def test_the_gateway_runs_no_code_of_the_archives_it_reads(store: Path, made: Path) -> None:
    assert Promises(store).of("digits-3.0.mar") is not None
    assert told(made) == {}


@pytest.mark.parametrize("how", [["status", "digits"], ["digits", "--dry-run"]], ids=["status", "dry run"])
def test_asking_where_a_model_stands_runs_none_of_its_code(
        store: Path, records: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        how: list[str]) -> None:
    server = serving("server", store)
    server.register("digits-3.0.mar", RunSettings())
    server.set_default("digits", "3.0", limit_s=1.0)
    monkeypatch.setattr(watching, "servers_of", lambda options: [server])
    assert watching.main([*how, "--model-store", str(store), "--records", str(records),
                          "--state", str(tmp_path / "state")]) == 0
    assert told(made) == {}


def test_training_and_its_report_run_none_of_the_archives_code_unless_requests_are_replayed(
        store: Path, records: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mar, run = store / "digits-3.0.mar", tmp_path / "run"
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert ee_train([str(records), "--archive", str(mar), "--to", str(run), *TRAINING]) == 0
    evaluate(RunPaths(run), max_seconds=1)
    assert told(made) == {}
    assert ee_train([str(records), "--archive", str(mar), "--to", str(tmp_path / "replayed"), *TRAINING,
                     "--replay", "0"]) == 0
    seen = told(made)
    assert seen.keys() == {"digits_handler"}, "that its code runs is what the page says"
    assert not seen["digits_handler"].keys() & SECRETS.keys() and seen["digits_handler"]["PATH"]
    assert os.environ.items() >= SECRETS.items(), "they are back afterwards"



@pytest.mark.slow
def test_code_that_is_tried_out_sees_no_secret_and_what_it_was_promised(
        store: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, "VOCABULARY": "/words", "EE_ARCHIVE_ENV": "VOCABULARY, OTHER"}.items():
        monkeypatch.setenv(name, value)
    check(store / "digits-3.0.mar")
    seen = told(made)
    assert seen.keys() == {"digits_handler", "early_exit.handler.service"}
    for variables in seen.values():
        assert not variables.keys() & {*SECRETS, "EE_ARCHIVE_ENV"}
        assert variables["VOCABULARY"] == "/words" and variables["PATH"]
