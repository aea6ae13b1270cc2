"""Which ports `ee-serve --host` opens to other machines, and that the workers' secret is nowhere but in its file."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from early_exit.archiver.torchserve.tokens import read_token
from tests.support.client import consecutive_free_ports

pytestmark = pytest.mark.slow

ELSEWHERE = "127.0.0.2"
"""Another interface of this machine: a server that listens on 127.0.0.1 alone does not answer on it."""


def of_all(processes: list[psutil.Process], ask: Callable[[psutil.Process], list[Any]]) -> list[Any]:
    """Return what the processes tell. Some may have ended, such as those that measure the system for TorchServe."""
    told: list[Any] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            told += ask(process)
    return told


def test_host_opens_predictions_and_neither_management_nor_metrics_and_the_secret_is_in_its_file_only(
        tmp_path: Path) -> None:
    (tmp_path / "model-store").mkdir()
    port, state = consecutive_free_ports(), tmp_path / ".ee-serve"
    state.mkdir()
    (tmp_path / "linked").write_text("untouched")
    (state / "secret").symlink_to(tmp_path / "linked")
    command = [Path(sys.executable).parent / "ee-serve", "--host", "0.0.0.0", "--port", str(port), "--json"]
    with subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as serving:
        assert serving.stdout is not None
        try:
            printed = serving.stdout.readline()
            places = json.loads(printed)
            key = {kind: {"Authorization": f"Bearer {read_token(state / 'key_file.json', kind)}"}
                   for kind in ("inference", "management")}
            processes = [psutil.Process(serving.pid), *psutil.Process(serving.pid).children(recursive=True)]
            opened = {connection.laddr.port for connection in of_all(processes, lambda one: one.net_connections("inet"))
                      if connection.status == psutil.CONN_LISTEN
                      and not connection.laddr.ip.removeprefix("::ffff:").startswith("127.")}
            assert opened == {port}
            pinged = requests.get(f"http://{ELSEWHERE}:{port}/ping", headers=key["inference"], timeout=20)
            assert pinged.status_code == 200
            for closed, path in ((port + 1, "models"), (port + 2, "metrics")):
                with pytest.raises(requests.ConnectionError):
                    requests.get(f"http://{ELSEWHERE}:{closed}/{path}", headers=key["management"], timeout=20)
            for place in ("management", "metrics"):
                assert places[place].startswith("http://127.0.0.1:")
            assert requests.get(f"{places['management']}/models", headers=key["management"], timeout=20).ok
            assert requests.get(places["metrics"], timeout=20).ok

            file = Path(places["secret"])
            secret = file.read_text().strip()
            assert len(secret) == 48 and stat.S_IMODE(file.lstat().st_mode) == 0o600
            assert (tmp_path / "linked").read_text() == "untouched"
            command_lines = of_all(processes, psutil.Process.cmdline)
            assert len(command_lines) > 10 and not any(secret in text for text in (printed, *command_lines))
            assert [path for path in state.rglob("*") if path.is_file() and secret in path.read_text(errors="replace")
                    ] == [file]
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                serving.send_signal(number)
            assert serving.wait(60) == 0
        assert secret not in serving.stdout.read()
    assert not file.exists(), "it died with the server"
    assert not [one for one in processes if one.is_running()], "the first signal stops everything, whatever follows"
