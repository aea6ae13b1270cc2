"""The commands for those who have an archive and a server, and for those who have a detector, as they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from early_exit.archiver.packaging.describe import describe
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from tests.conftest import WORKERS
from tests.support.client import send
from tests.support.detector import sure_detector
from tests.support.digits import traffic
from tests.support.documents import README, ROOT
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import original_mar
from tests.support.reader import Reader
from tests.support.workers import wait_until_ready

pytestmark = pytest.mark.slow


def test_the_page_for_those_who_have_a_mar_works_as_it_stands(digits_backbone: DigitsResNet, tmp_path: Path) -> None:
    """With digits, whose handler does not bring images to one size."""
    body = traffic(1, seed=60)[0].body
    (tmp_path / "typical.jpg").write_bytes(body)
    mar = original_mar(tmp_path / "user", "yours", "digits_resnet.py", "digits_handler.py",
                       digits_backbone.state_dict(), WORKERS.format(n=1))
    store = tmp_path / "model-store"
    store.mkdir()
    for folder in (tmp_path, store):
        shutil.copy(mar, folder)
    reader = Reader(ROOT / "docs" / "migrate.md", tmp_path, more={"ee-archive": "--input-shape 1,32,32"}, instead={})
    addresses = Addresses.on_loopback(*range(reader.port, reader.port + 3))
    with TorchServe(store, tmp_path / ".ee-serve", addresses, models=["yours.mar"]) as server:
        wait_until_ready(server, "yours")
        [before] = send(server, "yours", [body])
        reader.check("ee-archive yours.mar")
        reader.check("ee-roll")
        [after] = send(server, "yours", [body])
    reader.at_the_end()
    assert (before.version, after.version) == ("", "2.0") and before.top() == after.top()


def test_the_command_for_detectors_makes_an_archive(tmp_path: Path) -> None:
    mar = original_mar(tmp_path / "user", "detector", "small_detector.py", "object_detector",
                       sure_detector().state_dict(), WORKERS.format(n=1))
    shutil.copy(mar, tmp_path)
    reader = Reader(README, tmp_path, instead={"3,480,640": "3,96,96"}, more={}, elsewhere=dict.fromkeys(
        ("cifar", "records", "runs", "curl", "ee-gateway"), "test_readme.py"))
    reader.check("ee-archive detector.mar")
    reader.at_the_end()
    assert describe(tmp_path / "model-store" / "detector-2.0.mar")["backbone"]["candidates"]
