"""The search in NNI's service: the same trials and files as here, on this machine and on others."""

from __future__ import annotations

import base64
import errno
import ipaddress
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest
import yaml

from early_exit.handler.errors import ConfigError
from early_exit.training.costs.cost import FlopCost
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.journal import append, gather, read_journal, write_result
from early_exit.training.heads.nni_algorithms import JournalTpe
from early_exit.training.heads.nni_service import Service, search_in_service
from early_exit.training.heads.search import Search, search_layer
from early_exit.training.heads.space import SearchSpace
from early_exit.training.heads.trial import Evaluator
from early_exit.training.paths import RunPaths
from tests.support.skips import MAY_NOT_ACT_AS_ANOTHER
from tests.support.sshd import USER, sshd
from tests.support.training_set import LAYER, made_training_set

SPACE = SearchSpace(linears=(0, 1), width=(2, 4, 8, 16))


def evaluator(run: RunPaths) -> Evaluator:
    return Evaluator(LAYER, made_training_set(run.training_set.root), 0.05, Distillation(epochs=3), FlopCost(100_000))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_killed_search_in_the_service_goes_on_with_the_journal_it_has(tmp_path: Path) -> None:
    run, port = RunPaths(tmp_path), free_port()
    code = ("from tests.training.test_service import *; "
            f"run = RunPaths(Path({str(tmp_path)!r})); "
            f"search_in_service(evaluator(run), SPACE, Search(trials=50), Service(port={port}), run, print)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not run.trial_results(LAYER.path) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    told: list[str] = []
    here = evaluator(run)
    service = Service({**Service().settings, "trialConcurrency": 2, "maxExperimentDuration": "5m"}, port)
    more = len(run.trial_results(LAYER.path)) + 2
    trials = search_in_service(here, SPACE, Search(trials=more), service, run, told.append)
    assert f"http://127.0.0.1:{port}" in told[1]
    assert read_journal(run, LAYER.path) == trials and len(trials) > 1
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
    assert sorted(asked) == [4, 8]  # 2 is in the journal
    swapped, _ = evaluating.run(1, {"linears": 1, "width1": asked[1]}, lambda trial: True)
    write_result(run, LAYER.path, swapped)
    for parameter_id in (0, 77):  # NNI says it was the first one, or one that was never asked for
        tuner.receive_trial_result(parameter_id, {"width1": asked[0]}, {"default": 0.0, "number": 1})
    assert [record.loss for record in tuner._history["width1",]] == [
        tried.objective, swapped.objective, swapped.objective]


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
    ("searchSpace: {}", "not a setting of NNI that is yours to make"),
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


def put_code(file: Path) -> tuple[str, bytes]:
    """Return path and body of a REST call after which NNI's dispatcher, where it hears it, makes a file: it unpickles
    a search space, which stays as it is."""
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            space = SPACE.choices(LAYER.shape, None)
            return eval, (f"[__import__('pathlib').Path({str(file)!r}).touch(), {space!r}][1]",)

    pickled = base64.b64encode(pickle.dumps(Code())).decode()
    return ("/api/v1/nni/experiment?update_type=SEARCH_SPACE",
            json.dumps({"params": {"searchSpace": {"__nni_obj__": pickled}}}).encode())


def status(address: str, port: int, method: str, path: str, body: bytes = b"",
           headers: Mapping[str, str] | None = None) -> int | None:
    """Return the status of an answer; None where nothing listens or the connection is closed without one."""
    connection = HTTPConnection(address, port, timeout=10)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


@dataclass(frozen=True)
class Attacked:
    """What became of code that was sent to NNI's port while a search ran."""

    folder: Path
    """Each attack that succeeded has made a file here."""
    answers: Mapping[str, int | None]
    """The status that each attack was answered with, by its name."""
    taken: set[str]
    """The loopback addresses at which nobody else could listen on NNI's port."""
    told: list[str]
    run: RunPaths


ADDRESSES = [address.address for addresses in psutil.net_if_addrs().values() for address in addresses
             if address.family in (socket.AF_INET, socket.AF_INET6)]
ELSEWHERE = ["127.0.0.2", *(address for address in ADDRESSES if not ipaddress.ip_address(address).is_loopback)]
"""The addresses of this machine at which others reach it, and one that a service reaches only on all interfaces."""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    folder, run, port = tmp_path_factory.mktemp("made"), RunPaths(tmp_path_factory.mktemp("run")), free_port()
    folder.chmod(0o777)  # for the other user
    answers: dict[str, int | None] = {}
    taken: set[str] = set()
    told: list[str] = []

    def attack(name: str, address: str, headers: Mapping[str, str] | None = None) -> None:
        answers[name] = status(address, port, "PUT", *put_code(folder / name), headers)

    def attack_as_another_user() -> None:
        path, body = put_code(folder / "user")
        request = (f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                   f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n").encode() + body
        done = subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port} && cat >&3 && cat <&3"], cwd="/",
                              input=request, user=65534, capture_output=True, timeout=60, check=False)
        answers["user"] = int(done.stdout.split()[1]) if done.stdout else None

    def attack_all(line: str) -> None:
        told.append(line)
        if f":{port}" not in line:
            return
        deadline = time.monotonic() + 120
        while answers.get("early") != 200 and time.monotonic() < deadline:  # NNI answers once its tuner is there
            attack("early", "127.0.0.1")
        for address in ELSEWHERE:
            attack(address, address)
        for address in ("127.0.0.1", "::1"):
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as impostor:
                try:
                    impostor.bind((address, port))
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        taken.add(address)
        if os.geteuid() == 0:
            attack_as_another_user()
        attack("rebound", "127.0.0.1", {"Host": f"page.example:{port}"})
        attack("page", "127.0.0.1", {"Origin": "http://page.example"})
        attack("late", "127.0.0.1", {"Origin": f"http://127.0.0.1:{port}"})  # the tuner takes them in order
        while not (folder / "late").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        answers["socket"] = status("127.0.0.1", port, "GET", "/tuner", headers={
            "Origin": "http://page.example", "Connection": "Upgrade", "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": base64.b64encode(b"16 bytes of text").decode()})

    umask = os.umask(0)
    try:
        search_in_service(evaluator(run), SPACE, Search(trials=2), Service(port=port), run, attack_all)
    finally:
        os.umask(umask)
    return Attacked(folder, answers, taken, told, run)


@pytest.mark.slow
def test_code_that_this_user_sends_to_nni_is_run(attacked: Attacked) -> None:
    """The attack is one, so that those that follow show something."""
    for name in ("early", "late"):
        assert attacked.answers[name] == 200 and (attacked.folder / name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("address", ELSEWHERE)
def test_code_sent_to_another_address_of_this_machine_is_not_run(attacked: Attacked, address: str) -> None:
    assert attacked.answers[address] is None and not (attacked.folder / address).exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason=MAY_NOT_ACT_AS_ANOTHER)
def test_code_that_another_user_of_this_machine_sends_is_not_run(attacked: Attacked) -> None:
    assert attacked.answers["user"] is None and not (attacked.folder / "user").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rebound", "page"])
def test_code_that_a_page_sends_through_the_browser_is_not_run(attacked: Attacked, name: str) -> None:
    assert attacked.answers[name] is None and not (attacked.folder / name).exists()


@pytest.mark.slow
def test_a_page_cannot_become_nnis_tuner(attacked: Attacked) -> None:
    assert attacked.answers["socket"] is None


@pytest.mark.slow
def test_nobody_else_can_answer_where_nnis_trials_ask(attacked: Attacked) -> None:
    assert attacked.taken == {"127.0.0.1", *(["::1"] if "::1" in ADDRESSES else [])}


@pytest.mark.slow
def test_what_nni_writes_is_for_this_user_alone_whatever_the_umask(attacked: Attacked) -> None:
    nni = attacked.run.experiments.parent
    written = [nni, *(path for path in attacked.run.experiments.rglob("*") if not path.is_symlink())]
    assert len(written) > 10 and not [path for path in written if path.stat().st_mode & 0o077]


@pytest.mark.slow
def test_the_user_is_told_first_who_reaches_nni(attacked: Attacked) -> None:
    assert "only your own processes on this machine" in attacked.told[0]


def test_only_a_service_with_other_machines_can_be_exposed(tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text("trialConcurrency: 2")
    with pytest.raises(ConfigError, match="leave it out"):
        Service.load(tmp_path / "service.yaml", exposed=True)
