"""Who can make NNI's service run code: attacks on its port from elsewhere, by another user, and through a browser."""

from __future__ import annotations

import base64
import contextlib
import errno
import ipaddress
import json
import os
import pickle
import socket
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil
import pytest

from early_exit.training.heads.nni_service import Service, _stop_left_over, search_in_service
from early_exit.training.heads.search import Search
from early_exit.training.paths import RunPaths
from tests.support.skips import MAY_NOT_ACT_AS_ANOTHER
from tests.support.training_set import LAYER
from tests.training.test_service import SPACE, evaluator, free_port


def put_code(file: Path) -> tuple[str, bytes]:
    """Return the path and the body of a REST call that makes NNI's dispatcher create a file if it receives the call:
    the dispatcher unpickles a search space, which stays unchanged."""
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            space = SPACE.choices(LAYER.shape, None)
            return eval, (f"[__import__('pathlib').Path({str(file)!r}).touch(), {space!r}][1]",)

    pickled = base64.b64encode(pickle.dumps(Code())).decode()
    return ("/api/v1/nni/experiment?update_type=SEARCH_SPACE",
            json.dumps({"params": {"searchSpace": {"__nni_obj__": pickled}}}).encode())


def status(address: str, port: int, method: str, path: str, body: bytes = b"",
           headers: Mapping[str, str] | None = None) -> int | None:
    """Return the status of the answer, or None if nothing listens or the connection is closed without an answer."""
    connection = HTTPConnection(address, port, timeout=10)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def status_for_another_user(port: int, file: Path) -> int | None:
    """Send the call as another user of this machine; return the status, or None if there is no answer."""
    path, body = put_code(file)
    request = (f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
               f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n").encode() + body
    done = subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port} && cat >&3 && cat <&3"], cwd="/",
                          input=request, user=65534, capture_output=True, timeout=60, check=False)
    return int(done.stdout.split()[1]) if done.stdout else None


def answer_one(listener: socket.socket) -> None:
    """Answer the next connection with status 204, whatever it asks for."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(2**16)
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


@dataclass(frozen=True)
class Attacked:
    """The outcome of sending code to NNI's port while a search ran."""

    folder: Path
    """Each successful attack has created a file in this folder."""
    answers: Mapping[str, int | None]
    """The status of the answer to each attack, by the name of the attack."""
    taken: set[str]
    """The loopback addresses at which no other process could listen on NNI's port."""
    told: list[str]
    run: RunPaths


ADDRESSES = [address.address for addresses in psutil.net_if_addrs().values() for address in addresses
             if address.family in (socket.AF_INET, socket.AF_INET6)]
ELSEWHERE = ["127.0.0.2", *(address for address in ADDRESSES if not ipaddress.ip_address(address).is_loopback)]
"""The addresses at which other machines reach this one, and one at which a service answers only if it listens on all
interfaces."""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    folder, run, port = tmp_path_factory.mktemp("made"), RunPaths(tmp_path_factory.mktemp("run")), free_port()
    folder.chmod(0o777)  # so that the other user can write here
    answers: dict[str, int | None] = {}
    taken: set[str] = set()
    told: list[str] = []

    def attack(name: str, address: str, headers: Mapping[str, str] | None = None) -> None:
        answers[name] = status(address, port, "PUT", *put_code(folder / name), headers)

    def attack_as_another_user() -> None:
        with socket.create_server(("127.0.0.1", 0)) as anyone, ThreadPoolExecutor(1) as pool:
            pool.submit(answer_one, anyone)
            answers["user, elsewhere"] = status_for_another_user(anyone.getsockname()[1], folder / "elsewhere")
        answers["user"] = status_for_another_user(port, folder / "user")

    def attack_all(line: str) -> None:
        told.append(line)
        if f":{port}" not in line:
            return
        deadline = time.monotonic() + 120
        while answers.get("early") != 200 and time.monotonic() < deadline:  # NNI needs its tuner to answer
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
        attack("late", "127.0.0.1", {"Origin": f"http://127.0.0.1:{port}"})  # the tuner keeps the order
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
    """The attack works for this user, so the tests below prove something by its failure."""
    for name in ("early", "late"):
        assert attacked.answers[name] == 200 and (attacked.folder / name).exists()


@pytest.mark.slow
@pytest.mark.parametrize("address", ELSEWHERE)
def test_code_sent_to_another_address_of_this_machine_is_not_run(attacked: Attacked, address: str) -> None:
    assert attacked.answers[address] is None and not (attacked.folder / address).exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason=MAY_NOT_ACT_AS_ANOTHER)
def test_code_that_another_user_of_this_machine_sends_is_not_run(attacked: Attacked) -> None:
    assert attacked.answers["user, elsewhere"] == 204, "the other user's attack arrives where it is not refused"
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


def test_who_listens_where_a_killed_search_did_is_not_asked_which_process_to_end(tmp_path: Path) -> None:
    run, asked = RunPaths(tmp_path), []
    run.running.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as impostor, subprocess.Popen(["sleep", "0"]) as gone:
        gone.wait()
        port = impostor.getsockname()[1]
        run.running.write_text(json.dumps({"id": "abc", "port": port, "process": gone.pid, "started": 1.0}))
        _stop_left_over(run)
        impostor.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            asked.append(impostor.accept())
    assert not asked
