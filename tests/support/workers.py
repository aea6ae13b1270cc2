"""The workers of a running TorchServe."""

from __future__ import annotations

import os
import signal

import psutil
import requests

from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from tests.support.waiting import wait_until


def wait_until_ready(server: TorchServe, model: str = "digits") -> None:
    """Wait for the first worker of a model."""
    management = Management(server.addresses, server.key_file, server.secret_file)
    wait_until(lambda: not (versions := management.versions(model)) or versions[0].n_ready >= 1,
               "the worker does not start", limit_s=90, every_s=0.5)


def worker_process(server: TorchServe, model: str) -> psutil.Process:
    """Return the only worker of a model."""
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {read_token(server.key_file, 'management')}"
    [version] = session.get(f"{server.addresses.management}/models/{model}", timeout=10).json()
    [worker] = version["workers"]
    return psutil.Process(worker["pid"])


def resident_mb(server: TorchServe) -> float:
    """Return the resident memory of all workers, in MiB."""
    return sum(worker.memory_info().rss for worker in server.workers()) / 2**20


def kill_worker(server: TorchServe) -> None:
    """Kill a worker as the kernel does when memory is short."""
    worker = next(process for process in server.workers() if "model_service_worker.py" in " ".join(process.cmdline()))
    os.kill(worker.pid, signal.SIGKILL)
