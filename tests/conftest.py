"""Fixtures that many tests share: a trained backbone for digits and its archives, which are made once."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# This must precede the import of torch, and also holds for servers that tests start. Small tensors gain nothing from
# more threads, and on a busy machine threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.tryout.child import launcher
from tests.support import skips
from tests.support.digits import train_backbone
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import original_mar
from tests.support.untried import build_untried

collect_ignore = ["benchmarks", "demo", "matrix", "site", "support"]
"""Folders whose code is run by hand or imported by tests. Pytest does not collect them, so that test runs do not depend
on what they need in addition."""
WORKERS = ("minWorkers: {n}\nmaxWorkers: {n}\nbatchSize: 4\nmaxBatchDelay: 20\n"
           "early_exit:\n  seal_after_s: 2\n  control_rate: 0\n")


settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine is no error


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.is_registered(skips):
        config.pluginmanager.register(skips)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first: those with servers, then those with slow tests, then the others.

    Parallel processes then end at about the same time.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("end_to_end" not in item.path.parts, item.path not in slow))


@pytest.fixture(scope="session", autouse=True)
def one_launcher() -> Generator[None]:
    """Start one process from which all archives that the tests make are tried out."""
    with launcher():
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return a folder that all processes of a test run share."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def digits_backbone(shared: Path) -> DigitsResNet:
    """Return a trained backbone for digits. It is trained once for all processes of a test run."""
    weights = shared / "digits.pth"
    with FileLock(shared / "digits.lock"):
        if not weights.exists():
            torch.save(train_backbone(n_steps=100).state_dict(), weights)
    backbone = DigitsResNet()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    return backbone.eval()


@pytest.fixture(scope="session")
def digits_mar(digits_backbone: DigitsResNet, shared: Path) -> Path:
    """Return a user's archive: an eager model, its state dict, and a subclass of TorchServe's image classifier.

    It is made once for all processes of a test run, because torch-model-archiver writes the time into it.
    """
    with FileLock(shared / "original.lock"):
        if not (mar := shared / "original" / "digits.mar").exists():
            original_mar(mar.parent, "digits", "digits_resnet.py", "digits_handler.py",
                         digits_backbone.state_dict(), WORKERS.format(n=1))
    return mar


@pytest.fixture(scope="session")
def recorder_mar(digits_mar: Path, shared: Path) -> Path:
    """Return the same archive, repackaged as digits 2.0, which records and gives full answers.

    It is made once for all processes of a test run.
    """
    with FileLock(shared / "recorder.lock"):
        if not (mar := shared / "store" / "digits-2.0.mar").exists():
            build_untried(ArchiveRequest(str(digits_mar), mar.parent, input_shape=(1, 32, 32)))
    return mar
