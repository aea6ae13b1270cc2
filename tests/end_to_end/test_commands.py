"""The four commands as a user runs them, one after the other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from early_exit.archiver.addresses import Addresses, free_ports
from early_exit.archiver.server import TorchServe
from tests.support.client import failed, send
from tests.support.digits import traffic

pytestmark = pytest.mark.slow

COMMANDS = Path(sys.executable).parent


def run(folder: Path, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMANDS / command, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
                          timeout=300, check=False)


def consecutive_free_ports() -> int:
    """Return the first of three free ports in a row."""
    for _ in range(50):
        (first,) = free_ports(1)
        if not any(_in_use(first + offset) for offset in range(3)):
            return first
    raise AssertionError("no three free ports in a row")


def _in_use(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_whole_loop_by_command_line(digits_mar: Path, tmp_path: Path) -> None:
    requests = traffic(1500, seed=6)
    archived = run(tmp_path, "ee-archive", digits_mar, "--input-shape", "1,32,32")
    assert archived.returncode == 0, archived.stderr
    assert "model-store/digits-2.0.mar" in archived.stdout
    port = consecutive_free_ports()
    serving = subprocess.Popen([COMMANDS / "ee-serve", "digits-2.0.mar", "--port", str(port)], cwd=tmp_path,
                               stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout is not None
        printed = [serving.stdout.readline() for _ in range(6)]
        assert f"http://127.0.0.1:{port}" in printed[0] and "Ctrl-C" in printed[-1]
        addresses = Addresses.on_loopback(port, port + 1, port + 2)
        server = TorchServe(tmp_path / "model-store", tmp_path / ".ee-serve", addresses)
        assert failed(send(server, "digits", [one.body for one in requests])) == 0
        time.sleep(4)  # the last shard is sealed after two seconds

        too_strict = run(tmp_path, "ee-train", "records", "--archive", "model-store/digits-2.0.mar",
                         "--tolerance", "0.001", "--to", "runs/strict")
        assert too_strict.returncode == 1
        assert "needs at least 2995" in too_strict.stderr
        assert not (tmp_path / "runs" / "strict" / "plan.json").exists()

        trained = run(tmp_path, "ee-train", "records", "--archive", "model-store/digits-2.0.mar",
                      "--tolerance", "0.05", "--trials", "2", "--to", "runs/first")
        assert trained.returncode == 0, trained.stderr
        assert "With 95% confidence" in trained.stdout
        reported = run(tmp_path, "ee-train", "report", "runs/first")
        assert reported.returncode == 0, reported.stderr
        assert (tmp_path / "runs" / "first" / "report.html").exists()
        repackaged = run(tmp_path, "ee-archive", "model-store/digits-2.0.mar", "--plan", "runs/first/plan.json")
        assert repackaged.returncode == 0, repackaged.stderr
        rolled = run(tmp_path, "ee-roll", "model-store/digits-3.0.mar", "--port", port, "--json")
        assert rolled.returncode == 0, rolled.stderr
        assert json.loads(rolled.stdout)["replaced"] == "2.0"
        fresh = send(server, "digits", [one.body for one in traffic(300, seed=7)])
        assert failed(fresh) == 0
        assert any(reply.exit != "full" for reply in fresh)
        children = psutil.Process(serving.pid).children(recursive=True)
        assert len(children) >= 2, "the server and a worker"
    finally:
        serving.send_signal(signal.SIGINT)
        status = serving.wait(60)
    assert status == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "Ctrl-C stops the server and its workers"
    assert not (tmp_path / ".ee-serve" / "key_file.json").exists()


def test_a_missing_server_is_a_message_and_status_1(recorder_mar: Path, tmp_path: Path) -> None:
    rolled = run(tmp_path, "ee-roll", recorder_mar, "--port", consecutive_free_ports(), "--no-tokens")
    assert rolled.returncode == 1
    assert "Is TorchServe running there?" in rolled.stderr
    assert "Traceback" not in rolled.stderr


@pytest.mark.parametrize("arguments", [("ee-train", "records"), ("ee-archive",), ("ee-roll",)])
def test_misuse_is_status_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert run(tmp_path, *arguments).returncode == 2
