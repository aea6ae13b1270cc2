"""The gateway's WebSocket in front of a real TorchServe: answers one by one, limits, tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
from websockets.exceptions import ConnectionClosed

from early_exit.archiver.gateway.messages import Limits
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from tests.conftest import WORKERS
from tests.support.digits import traffic
from tests.support.gateway import ALLOWED, as_bytes, as_text, connected, gateway, receive, wait_for_state
from tests.support.models.slow_end import SlowEnd
from tests.support.original import factory_request
from tests.support.plans import write_plan
from tests.support.untried import build_untried

pytestmark = pytest.mark.slow

BODIES = [one.body for one in traffic(40, seed=15)]


@pytest.fixture(scope="module")
def server(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("gateway")
    config = folder / "config.yaml"
    config.write_text(WORKERS.format(n=1))
    plan = write_plan(folder / "run", recorder_mar, threshold=0.4)
    mar = build_untried(ArchiveRequest(str(recorder_mar), folder / "store", plan=plan, version="3.0", config=config))
    with TorchServe(folder / "store", folder / "state", Addresses.free(), models=[mar.name]) as running:
        yield running


@pytest.fixture(scope="module")
def address(server: TorchServe) -> Iterator[str]:
    with gateway(server.addresses, server.key_file, server.secret_file, store=server.model_store,
                 limits=Limits(bytes_per_item=100_000, in_flight=8)) as at:
        yield at


def test_each_item_is_answered_by_itself_as_the_server_would_and_a_bad_one_costs_nothing(
        server: TorchServe, address: str) -> None:
    bodies = {f"item {number}": body for number, body in enumerate(BODIES)}
    bodies |= {"bad": b"no image", "big": bytes(100_001)}
    with connected(address) as socket:
        socket.send(as_text(dict(list(bodies.items())[:20])))
        socket.send(as_bytes(dict(list(bodies.items())[20:])))
        told = receive(socket, len(bodies))
    assert told.keys() == bodies.keys()
    assert (told["bad"]["status"], told["big"]["status"]) == (400, 413)
    assert "UnidentifiedImageError" in told["bad"]["error"]
    good = [told[f"item {number}"] for number in range(len(BODIES))]
    assert {one["status"] for one in good} == {200} and {one["version"] for one in good} == {"3.0"}
    assert len({one["exit"] for one in good}) > 1
    assert all(0 < one["confidence"] <= 1 < one["latency_ms"] for one in good)
    assert all(len(one["answer"]) == 3 for one in good), "the handler's own answer"


def test_opinions_come_with_the_answer_when_asked_for(address: str) -> None:
    with connected(address) as socket:
        socket.send(as_bytes({"a": BODIES[0]}, anytime=True))
        told = receive(socket, 1)["a"]
    assert [one["exit"] for one in told["opinions"]][-1] == "full" and told["exit"] in [
        one["exit"] for one in told["opinions"]]
    asked = requests.post(f"http://{address}/ask/digits", headers=ALLOWED, data=BODIES[0], timeout=30).json()
    assert asked["opinions"] == told["opinions"]
    state = wait_for_state(address, lambda state: sum(look["anytime"].get("3.0", 0) for look in state["looks"]) == 2)
    assert sum(sum(look["answers"].get("3.0", {}).values()) for look in state["looks"]) >= 2, "they are answers as well"


def test_a_gateway_without_the_secret_lends_no_full_passes(server: TorchServe) -> None:
    with gateway(server.addresses, server.key_file) as for_others, connected(for_others) as socket:
        socket.send(as_bytes({"a": BODIES[0]}, anytime=True))
        told = receive(socket, 1)["a"]
        asked = requests.post(f"http://{for_others}/ask/digits", headers=ALLOWED, data=BODIES[0], timeout=30).json()
    for message in (told, asked):
        assert message["status"] == 200 and message["exit"] and "opinions" not in message


def test_early_answers_overtake_a_full_one_that_was_sent_before_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    asked = factory_request(tmp_path / "original", tmp_path, "slow", SlowEnd(), "digits_handler.py",
                            WORKERS.format(n=1).replace("batchSize: 4", "batchSize: 16") + "  answers: early\n"
                            "  sampling_rate: 0\n",  # a shadow sample would be answered at the end only
                            input_shape=(1, 32, 32))
    without = build_untried(replace(asked, version="1.0"))
    plan = write_plan(tmp_path / "run", without, threshold=0.121, which=slice(3, 4))
    mar = build_untried(ArchiveRequest(str(without), tmp_path / "store", plan=plan, version="2.0"))
    with TorchServe(tmp_path / "store", tmp_path / "state", Addresses.free(), models=[mar.name]) as slow, \
            gateway(slow.addresses, slow.key_file) as address, connected(address, "slow") as socket:
        socket.send(as_bytes({str(number): body for number, body in enumerate(BODIES[:20])}))
        told = receive(socket, 20)
        early, full = ([BODIES[int(name)] for name, one in told.items() if (one["exit"] == "full") == is_full]
                       for is_full in (False, True))
        assert len(early) >= 4 and full
        # The others arrive while the worker is busy with these, so it takes all of them into one batch.
        before = {f"before {number}": full[0] for number in range(4)}
        socket.send(as_bytes(before))
        time.sleep(0.2)
        socket.send(as_bytes({"full": full[0], **{f"early {number}": body for number, body in enumerate(early[:4])}}))
        order = list(receive(socket, 9))
        assert all(order.index(f"early {number}") < order.index("full") for number in range(4)), order


def test_what_cannot_be_read_closes_with_a_code_and_the_reason_after_what_was_asked_before(address: str) -> None:
    with connected(address) as socket:
        socket.send(as_text({"a": BODIES[0]}))
        socket.send("nonsense")
        assert receive(socket, 1)["a"]["status"] == 200
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=30)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1003 and "expected JSON" in closed.value.rcvd.reason


def test_a_frame_that_is_too_large_closes_with_1009_before_it_is_read(address: str) -> None:
    with connected(address) as socket:
        socket.send(bytes(4 * 100_000 + 1))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=30)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_an_unknown_model_and_a_server_that_is_gone_are_errors_of_the_item(address: str, tmp_path: Path) -> None:
    with connected(address, "nothing") as socket:
        socket.send(as_text({"a": BODIES[0]}))
        assert receive(socket, 1)["a"]["status"] == 404
    key_file = tmp_path / "keys.json"
    key_file.write_text(json.dumps({kind: {"key": "none"} for kind in ("inference", "management")}))
    with gateway(Addresses.free(), key_file) as alone, connected(alone) as socket:
        socket.send(as_text({"a": BODIES[0]}))
        told = receive(socket, 1)["a"]
        assert told["status"] == 502 and "no answer from" in told["error"]
        state = wait_for_state(alone, lambda state: state["trouble"] is not None)
        assert "no answer from" in state["trouble"] and state["model"] is None


def test_a_token_that_is_refused_is_renewed(server: TorchServe, address: str) -> None:
    """TorchServe's tokens are valid for an hour, and a gateway runs for longer."""
    keys = json.loads(server.key_file.read_text())
    keys["inference"]["key"] = keys["management"]["key"] = "expired"
    server.key_file.write_text(json.dumps(keys))
    with connected(address) as socket:
        socket.send(as_text({str(number): BODIES[0] for number in range(6)}))
        assert {one["status"] for one in receive(socket, 6).values()} == {200}
    assert read_token(server.key_file, "inference") != "expired"
    wait_for_state(address, lambda state: state["trouble"] is None)
    assert read_token(server.key_file, "management") != "expired"


def test_no_more_clients_than_allowed_are_connected(server: TorchServe) -> None:
    limits = Limits(connections=1)
    with gateway(server.addresses, server.key_file, limits=limits) as narrow, connected(narrow):
        with connected(narrow) as second, pytest.raises(ConnectionClosed) as refused:
            second.recv(timeout=30)
        assert refused.value.rcvd is not None and refused.value.rcvd.code == 1013


def test_a_client_that_leaves_costs_nobody_an_answer_and_who_reads_late_gets_all(address: str) -> None:
    many = as_bytes({str(number): BODIES[number % len(BODIES)] for number in range(60)})
    with connected(address) as lazy, connected(address) as leaves:
        lazy.send(many)
        leaves.send(many)
        leaves.close()
        with connected(address) as socket:
            socket.send(as_text({"a": BODIES[0]}))
            assert receive(socket, 1)["a"]["status"] == 200
        assert len(receive(lazy, 60)) == 60, "what it did not read waited for it"
