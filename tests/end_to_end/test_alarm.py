"""The monitor in a real worker gives up exits that break their certificate, and a new worker knows this."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk
from tests.conftest import WORKERS
from tests.support.client import Reply, failed, send
from tests.support.digits import traffic
from tests.support.plans import write_plan
from tests.support.untried import build_untried
from tests.support.workers import kill_worker, wait_until_ready

pytestmark = pytest.mark.slow

BODIES = [request.body for request in traffic(60, seed=15)]


def test_exits_that_differ_too_often_are_given_up_and_stay_so_in_a_new_worker(
        recorder_mar: Path, tmp_path: Path) -> None:
    """The heads are untrained, but the certificate says that at most 2 % of their answers differ."""
    certificate = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1500, 19, 0.0127, 0.03, "-", (0.0, 1.0))
    plan = write_plan(tmp_path / "run", recorder_mar, threshold=0.0, certificate=certificate)
    config = tmp_path / "config.yaml"
    config.write_text(WORKERS.format(n=1) + "  sampling_rate: 1.0\n")
    (tmp_path / "store").mkdir()
    build_untried(ArchiveRequest(str(recorder_mar), tmp_path / "store", plan=plan, version="2.0", config=config))
    with TorchServe(tmp_path / "store", tmp_path / "state", Addresses.free(), records=tmp_path / "records",
                    models=["digits-2.0.mar"]) as server:
        wait_until_ready(server)
        first = send(server, "digits", BODIES[:8])
        assert failed(first) == 0 and all(reply.exit != "full" for reply in first)
        deadline = time.monotonic() + 60
        while any(reply.exit != "full" for reply in send(server, "digits", BODIES)):
            assert time.monotonic() < deadline, "no alarm"
        kill_worker(server)
        replies: list[Reply] = []
        while not replies or failed(replies):
            assert time.monotonic() < deadline, "the worker does not come back"
            replies = send(server, "digits", BODIES[:8])
        assert all(reply.exit == "full" for reply in replies)
