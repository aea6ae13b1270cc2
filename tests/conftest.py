"""What many tests share: a trained digits backbone and its archives, made once."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# Before torch is imported, and for the servers that tests start: small tensors gain nothing from more threads, and on a
# busy machine threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from filelock import FileLock

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.tryout.child import launcher
from tests.support import skips
from tests.support.digits import train_backbone
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import original_mar
from tests.support.untried import build_untried

collect_ignore = ["benchmarks", "demo", "matrix", "site", "support"]
"""Run by hand, or imported by tests: what they need more of is not for every run."""
WORKERS = ("minWorkers: {n}\nmaxWorkers: {n}\nbatchSize: 4\nmaxBatchDelay: 20\n"
           "early_exit:\n  seal_after_s: 2\n  control_rate: 0\n")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.is_registered(skips):
        config.pluginmanager.register(skips)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, those with servers and then those with slow tests: who runs files side by
    side then ends together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("end_to_end" not in item.path.parts, item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def one_launcher() -> Generator[None]:
    """Let all archives that the tests make be tried out from one process."""
    with launcher():
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of all processes that run tests."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def digits_backbone(shared: Path) -> DigitsResNet:
    """Trained once for all processes that run tests."""
    weights = shared / "digits.pth"
    with FileLock(shared / "digits.lock"):
        if not weights.exists():
            torch.save(train_backbone(n_steps=100).state_dict(), weights)
    backbone = DigitsResNet()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    return backbone.eval()


@pytest.fixture(scope="session")
def digits_mar(digits_backbone: DigitsResNet, shared: Path) -> Path:
    """A user's archive: eager model, state dict, a handler that subclasses TorchServe's image classifier.

    It is made once for all processes that run tests: torch-model-archiver writes the time into it.
    """
    with FileLock(shared / "original.lock"):
        if not (mar := shared / "original" / "digits.mar").exists():
            original_mar(mar.parent, "digits", "digits_resnet.py", "digits_handler.py",
                         digits_backbone.state_dict(), WORKERS.format(n=1))
    return mar


@pytest.fixture(scope="session")
def recorder_mar(digits_mar: Path, shared: Path) -> Path:
    """The same, repackaged to record and answer in full: digits 2.0, once for all processes that run tests."""
    with FileLock(shared / "recorder.lock"):
        if not (mar := shared / "store" / "digits-2.0.mar").exists():
            build_untried(ArchiveRequest(str(digits_mar), mar.parent, input_shape=(1, 32, 32)))
    return mar
