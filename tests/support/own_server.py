"""A TorchServe that an operator starts with `torchserve --start`, without `ee-serve` and without a secret."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.programs import find_java
from early_exit.archiver.torchserve.tokens import read_token
from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import SECRET_VARIABLE
from tests.support.workers import wait_until_ready


@contextmanager
def own_server(folder: Path, store: Path, addresses: Addresses, model: str,
               properties: Sequence[str] = ()) -> Iterator[TorchServe]:
    """Start TorchServe in a folder with the archive MODEL.mar; yield an object with its addresses and tokens.

    Args:
        folder: an existing folder that only this server uses.
        store: the model store.
        addresses: the addresses at which the server listens.
        model: the name of the archive's file without ".mar".
        properties: more lines for config.properties.
    """
    (folder / "config.properties").write_text("\n".join([
        f"inference_address={addresses.inference}", f"management_address={addresses.management}",
        f"metrics_address={addresses.metrics}", "enable_model_api=true", f"allowed_urls=file://{store}/.*",
        *properties, ""]))
    temporary = folder / "temporary"  # not shared, as a server keeps its process ID there
    temporary.mkdir()
    environment = {**os.environ, "JAVA_HOME": str(Path(find_java()).resolve().parents[1]), "TEMP": str(temporary),
                   "TMPDIR": str(temporary), "LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)}
    environment.pop(SECRET_VARIABLE, None)
    command = [Path(sys.executable).parent / "torchserve", "--start", "--foreground", "--ncs", "--model-store", store,
               "--models", f"{model}.mar", "--ts-config", "config.properties"]
    with (folder / "printed").open("wb") as printed:
        started = subprocess.Popen(command, cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    server = TorchServe(store, folder, addresses)  # only describes the server and is never entered
    try:
        deadline = time.monotonic() + 60
        while not _answers(server):
            assert started.poll() is None and time.monotonic() < deadline, (folder / "printed").read_text()[-2000:]
            time.sleep(0.5)
        wait_until_ready(server, model)
        yield server
    finally:
        processes = psutil.Process(started.pid).children(recursive=True)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        psutil.wait_procs(processes, timeout=10)


def _answers(server: TorchServe) -> bool:
    try:
        token = {"Authorization": f"Bearer {read_token(server.key_file, 'inference')}"}
        return requests.get(f"{server.addresses.inference}/ping", headers=token, timeout=5).ok
    except (ServerError, requests.RequestException):  # no tokens yet, or not listening yet
        return False
