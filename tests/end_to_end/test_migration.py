"""The documented commands for users who have an archive and a server, and for users who have a detector, as written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import requests

from early_exit.archiver.packaging.describe import describe
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.switch.cli import main as switch_exits
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.exits.switch import SWITCHES_VARIABLE
from tests.conftest import WORKERS
from tests.support.client import BackgroundLoad, failed, send, session_of
from tests.support.detector import sure_detector
from tests.support.digits import traffic
from tests.support.documents import MIGRATION, MODES
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import original_mar
from tests.support.own_server import own_server
from tests.support.reader import Reader

pytestmark = pytest.mark.slow


def test_the_page_for_those_who_have_a_mar_works_as_it_stands(
        digits_backbone: DigitsResNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is digits, whose handler does not resize images. The user has started the server without `ee-serve`."""
    bodies = [request.body for request in traffic(40, seed=60)]
    (tmp_path / "typical.jpg").write_bytes(bodies[0])
    mar = original_mar(tmp_path / "user", "yours", "digits_resnet.py", "digits_handler.py",
                       digits_backbone.state_dict(), WORKERS.format(n=1))
    store = tmp_path / "model-store"
    store.mkdir()
    for folder in (tmp_path, store):
        shutil.copy(mar, folder)
    reader = Reader(MIGRATION, folder=tmp_path, more={"ee-archive": "--input-shape 1,32,32"},
                    instead={})
    monkeypatch.setenv(SWITCHES_VARIABLE, str(tmp_path / "switches"))
    addresses = Addresses.on_loopback(*range(reader.port, reader.port + 3))
    with own_server(tmp_path, store, addresses, "yours") as server:
        [before] = send(server, "yours", bodies[:1])
        reader.check("ee-archive yours.mar")
        assert set(read_archive(store / "yours-2.0.mar").sample_answers) == {"full"}
        with BackgroundLoad(server, "yours", bodies) as load:
            printed = reader.check("ee-roll")
        assert "its sample request is answered as it was where the archive was made" in printed
        [after] = send(server, "yours", bodies[:1])
        clients_force_no_full_pass(server, bodies[0])
        assert switch_exits(["yours", "off"]) == 0
        told = session_of(server).post(f"{addresses.inference}/predictions/yours", data=bodies[0], timeout=30).headers
        assert told["X-Early-Exit-Switch"] == "off", "its workers have the variable, too"
        with BackgroundLoad(server, "yours", bodies) as load_back:
            roll(Management(addresses, server.key_file), store / "yours.mar", longest_batch_s=1)
        [back] = send(server, "yours", bodies[:1])
    reader.at_the_end()
    assert (before.version, after.version) == ("", "2.0") and before.top() == after.top()
    assert (back.version, back.body) == ("", before.body), "the archive that was there before anything"
    assert failed(load.replies) == failed(load_back.replies) == 0


def clients_force_no_full_pass(server: TorchServe, body: bytes) -> None:
    """Try to force a full pass with the inference key, which all clients have, on a server without a secret."""
    token = {"Authorization": f"Bearer {read_token(server.key_file, 'inference')}"}
    for header in ("X-Early-Exit-Anytime", "X-Early-Exit-Probe"):
        for secret in ({}, {"X-Early-Exit-Secret": ""}, {"X-Early-Exit-Secret": "None"}):
            reply = requests.post(f"{server.addresses.inference}/predictions/yours", data=body, timeout=30,
                                  headers={**token, header: "1", **secret})
            assert reply.status_code == 200 and len(reply.json()) == 3 and "probe" not in reply.json()
            assert reply.headers["X-Early-Exit"] == "full" and "X-Early-Exit-Opinions" not in reply.headers


def test_the_command_for_detectors_makes_an_archive(tmp_path: Path) -> None:
    mar = original_mar(tmp_path / "user", "detector", "small_detector.py", "object_detector",
                       sure_detector().state_dict(), WORKERS.format(n=1))
    shutil.copy(mar, tmp_path)
    reader = Reader(MODES, folder=tmp_path, instead={"3,480,640": "3,96,96"}, more={})
    reader.check("ee-archive detector.mar")
    reader.at_the_end()
    assert describe(tmp_path / "model-store" / "detector-2.0.mar")["backbone"]["candidates"]
