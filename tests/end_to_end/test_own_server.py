"""A TorchServe that its operator started without `ee-serve` and without a secret is rolled, and forced to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.cli import main
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.java import find_java
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from early_exit.handler.archive_contents import read_archive
from tests.support.client import BackgroundLoad, failed, send
from tests.support.digits import traffic
from tests.support.plans import write_plan
from tests.support.untried import build_untried
from tests.support.workers import wait_until_ready

pytestmark = pytest.mark.slow

BODIES = [request.body for request in traffic(40, seed=31)]


@pytest.fixture(scope="module")
def store(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with digits 2.0, and 3.0 with exits, which was tried out where it was made."""
    folder = tmp_path_factory.mktemp("own") / "store"
    build_untried(ArchiveRequest(str(recorder_mar), folder, version="2.0"))
    plan = write_plan(folder.parent / "run", recorder_mar, threshold=0.4)
    build_archive(ArchiveRequest(str(recorder_mar), folder, plan=plan, version="3.0"))
    return folder


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[TorchServe]:
    """Where it listens and keeps its tokens; it was not started by this object."""
    folder, addresses = store.parent, Addresses.free()
    (folder / "config.properties").write_text("\n".join([
        f"inference_address={addresses.inference}", f"management_address={addresses.management}",
        f"metrics_address={addresses.metrics}", "enable_model_api=true", "metrics_mode=prometheus",
        f"allowed_urls=file://{store}/.*", ""]))
    environment = {**os.environ, "JAVA_HOME": str(Path(find_java()).resolve().parents[1]), "TEMP": str(folder),
                   "TMPDIR": str(folder), "LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)}
    environment.pop("EARLY_EXIT_SECRET", None)
    command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--model-store", str(store),
               "--models", "digits-2.0.mar", "--ts-config", "config.properties"]
    with (folder / "printed").open("wb") as printed:
        started = subprocess.Popen(command, cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    try:
        described = TorchServe(store, folder, addresses)
        wait_until_answering(described, started)
        yield described
    finally:
        processes = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        psutil.wait_procs(processes, timeout=10)


def wait_until_answering(server: TorchServe, started: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert started.poll() is None and time.monotonic() < deadline, (server.state / "printed").read_text()[-2000:]
        try:
            token = {"Authorization": f"Bearer {read_token(server.key_file, 'inference')}"}
            if requests.get(f"{server.addresses.inference}/ping", headers=token, timeout=5).ok:
                break
        except Exception:  # no tokens yet, or nobody listens
            pass
        time.sleep(0.5)
    wait_until_ready(server)


@pytest.fixture(autouse=True)
def with_the_handlers_of_signals_put_back() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_clients_force_no_full_pass_where_no_secret_is_set(server: TorchServe) -> None:
    token = {"Authorization": f"Bearer {read_token(server.key_file, 'inference')}"}
    for header in ("X-Early-Exit-Anytime", "X-Early-Exit-Probe"):
        for secret in ({}, {"X-Early-Exit-Secret": ""}, {"X-Early-Exit-Secret": "None"}):
            reply = requests.post(f"{server.addresses.inference}/predictions/digits", data=BODIES[0], timeout=30,
                                  headers={**token, header: "1", **secret})
            assert reply.status_code == 200 and len(reply.json()) == 3 and "probe" not in reply.json()
            assert "X-Early-Exit-Opinions" not in reply.headers


def test_it_is_rolled_under_load_once_the_longest_batch_is_given_and_its_sample_answer_compared(
        server: TorchServe, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(read_archive(store / "digits-3.0.mar").sample_answers) >= {"full"}
    asked = [str(store / "digits-3.0.mar"), "--server", f"{server.addresses.inference},{server.addresses.management}",
             "--tokens", str(server.key_file)]
    with BackgroundLoad(server, "digits", BODIES) as load:
        assert main(asked) == 1
        assert "pass --longest-batch-s" in capsys.readouterr().err
        assert main([*asked, "--longest-batch-s", "1"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "its sample request is answered as where the archive was made" in said.err
    assert "digits 3.0 serves instead of 2.0" in said.out
    assert failed(load.replies) == 0 and {reply.version for reply in load.replies} == {"2.0", "3.0"}
    assert any(reply.exit not in ("full", "") for reply in send(server, "digits", BODIES))
