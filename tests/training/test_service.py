"""A search in NNI's service makes the same trials and files as one in this process, on this machine or on others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml

from early_exit.archiver.torchserve.addresses import free_ports
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import ConfigError
from early_exit.training.cli import options_of, parser
from early_exit.training.costs.cost import FlopCost
from early_exit.training.heads import nni_service
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.journal import append, gather, read_journal, read_result, write_result
from early_exit.training.heads.nni_algorithms import JournalTpe
from early_exit.training.heads.nni_service import Service, search_in_service
from early_exit.training.heads.search import Search, search_layer
from early_exit.training.heads.space import SearchSpace
from early_exit.training.heads.trial import Evaluator
from early_exit.training.paths import RunPaths
from tests.support.sshd import USER, sshd
from tests.support.training_set import LAYER, made_training_set

SPACE = SearchSpace(linears=(0, 1), width=(2, 4, 8, 16))


def evaluator(run: RunPaths) -> Evaluator:
    return Evaluator(LAYER, made_training_set(run.training_set.root), 0.05, Distillation(epochs=3), FlopCost(100_000),
                     "confidence")


def free_port() -> int:
    return free_ports(1)[0]


@pytest.mark.slow
def test_a_killed_search_in_the_service_goes_on_with_the_journal_it_has(tmp_path: Path) -> None:
    run, port = RunPaths(tmp_path), free_port()
    code = ("from tests.training.test_service import *; "
            f"run = RunPaths(Path({str(tmp_path)!r})); "
            f"search_in_service(evaluator(run), SPACE, Search(trials=50), Service(port={port}), run, print)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not run.trial_results(LAYER.path):
        assert time.monotonic() < deadline and process.poll() is None, "no trial comes to a result"
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    survived = [read_result(run, LAYER.path, number) for number in run.trial_results(LAYER.path)]
    left = psutil.Process(json.loads(run.running.read_text())["process"])
    assert left.is_running(), "NNI goes on, though who started it was killed"

    told: list[str] = []
    here = evaluator(run)
    service = Service({**Service().settings, "trialConcurrency": 2, "maxExperimentDuration": "5m"}, port)
    more = len(run.trial_results(LAYER.path)) + 2
    trials = search_in_service(here, SPACE, Search(trials=more), service, run, told.append)
    assert not left.is_running(), "the next search has ended it"
    assert f"http://127.0.0.1:{port}" in told[1]
    assert read_journal(run, LAYER.path) == trials and len(trials) > len(survived) > 0
    by_number = {trial.number: trial for trial in trials}
    for trial in survived:  # a trial that was still running when it was read has a longer history now
        kept = by_number[trial.number]
        assert (kept.parameters, kept.history[:len(trial.history)]) == (trial.parameters, trial.history)
    assert sorted({trial.number for trial in trials}) == sorted(trial.number for trial in trials)
    finished = [trial for trial in trials if not trial.stopped]
    assert finished and all(run.trial(LAYER.path, trial.number).exists() for trial in finished)
    again, _ = here.run(0, finished[-1].parameters, lambda trial: True)
    assert again.objective == pytest.approx(finished[-1].objective, abs=0.02)
    assert not run.running.exists()


@pytest.mark.slow
def test_trials_run_on_other_machines_over_ssh(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    first = search_layer(evaluator(run), SPACE, Search(trials=1), run)
    (tmp_path / "home").mkdir()
    with sshd(tmp_path / "home") as server:
        file = tmp_path / "service.yaml"
        file.write_text(yaml.safe_dump({
            "port": free_port(), "nniManagerIp": "127.0.0.1", "maxExperimentDuration": "10m", "trainingService": {
                "platform": "remote", "machineList": [{
                    "host": "127.0.0.1", "port": server.port, "user": USER, "sshKeyFile": str(server.key_file),
                    "pythonPath": str(Path(sys.executable).parent)}]}}))
        told: list[str] = []
        trials = search_in_service(evaluator(run), SPACE, Search(trials=2), Service.load(file, exposed=True), run,
                                   told.append)
    assert "from anywhere, runs code as you" in told[0]
    assert trials[0] == first[0]
    assert [trial.number for trial in trials] == [0, 1]
    assert all(run.trial(LAYER.path, trial.number).exists() for trial in trials)
    assert any("launch_trial_keeper" in command for command in server.commands)


def test_the_tuner_believes_what_a_trial_wrote_and_knows_the_journal(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    evaluating = evaluator(run)
    tried, _ = evaluating.run(0, {"linears": 1, "width1": 2}, lambda trial: True)
    append(run, LAYER.path, tried)
    space = SearchSpace(linears=(1,), width=(2, 4, 8))
    tuner = JournalTpe(str(tmp_path), LAYER.path, seed=0, startup=8)
    tuner.update_search_space(space.choices(LAYER.shape, None))
    asked = [tuner.generate_parameters(number)["width1"] for number in (0, 1)]
    assert sorted(asked) == [4, 8]  # 2 is already in the journal
    swapped, _ = evaluating.run(1, {"linears": 1, "width1": asked[1]}, lambda trial: True)
    write_result(run, LAYER.path, swapped)
    for parameter_id in (0, 77):  # NNI names the first trial, or one that was never asked for
        tuner.receive_trial_result(parameter_id, {"width1": asked[0]}, {"default": 0.0, "number": 1})
    assert [record.loss for record in tuner._history["width1",]] == [
        tried.objective, swapped.objective, swapped.objective]


def test_a_search_that_ends_early_because_of_an_error_says_how_many_trials_it_chooses_from(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NNI's service gives up if its own processes take too long to start on a busy machine."""
    run = RunPaths(tmp_path)
    [first] = search_layer(evaluator(run), SPACE, Search(trials=1), run)
    broken = SimpleNamespace(id="k2x9", get_status=lambda: "ERROR", stop=lambda: None)
    monkeypatch.setattr(nni_service, "_start", lambda *arguments: broken)
    told: list[str] = []
    assert search_in_service(evaluator(run), SPACE, Search(trials=3), Service(), run, told.append) == [first]
    assert told[-1].startswith("NNI's service ended with an error after 1 of 3 trials") and "k2x9" in told[-1]


def test_results_are_gathered_once(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    evaluating = evaluator(run)
    for number in (10, 9):
        write_result(run, LAYER.path, evaluating.run(number, {"linears": 0}, lambda trial: False)[0])
    first = gather(run, LAYER.path)
    assert [trial.number for trial in first] == [9, 10] and all(trial.stopped for trial in first)
    assert gather(run, LAYER.path) == first == read_journal(run, LAYER.path)


@pytest.mark.parametrize(("text", "message"), [
    ("trialConcurency: 2", "did you mean 'trialConcurrency'"),
    ("searchSpace: {}", "not a setting of NNI that you can make"),
    ("port: 70000", "1 to 65535"),
    ("trialConcurrency: 0", "NNI refuses"),
    ("trainingService: {platform: remote}", "NNI refuses"),
    ("trainingService: {platform: remote, machineList: [{host: a, user: b, sshKeyFile: /none}]}", "SSH key file"),
    ("trainingService: {platform: remote, machineList: [{host: a, user: b, password: c}]}", "Pass --expose-nni"),
    ("trainingService: {platform: moon}", "NNI refuses"),
    ("[1]", "expected keys and values"),
    ("a: [", "cannot read"),
])
def test_a_service_file_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "service.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Service.load(tmp_path / "service.yaml")


def test_only_a_service_with_other_machines_can_be_exposed(tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text("trialConcurrency: 2")
    with pytest.raises(ConfigError, match="leave it out"):
        Service.load(tmp_path / "service.yaml", exposed=True)


def test_only_a_search_in_the_service_can_be_exposed(tmp_path: Path) -> None:
    asked = parser().parse_args(["records", "--archive", "a.mar", "--to", str(tmp_path), "--expose-nni"])
    with pytest.raises(ConfigError, match="but the search is nni: leave it out"):
        options_of(asked, ArchiveLayout(tmp_path))
