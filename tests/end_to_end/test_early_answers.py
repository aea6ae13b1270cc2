"""Early answers through a real TorchServe: the same answers, sooner, from one worker that cannot deadlock."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest
import requests

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from early_exit.handler.recording.format import list_shards, read_shard
from tests.conftest import WORKERS
from tests.support.client import BackgroundLoad, failed, metrics, send
from tests.support.digits import traffic
from tests.support.plans import write_plan
from tests.support.untried import build_untried
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

SECRET = "set by the operator, not made by ee-serve"
BODIES = [request.body for request in traffic(80, seed=8)]


@pytest.fixture(scope="module")
def store(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the same exits twice: digits 3.0 with plain batching, digits 4.0 with early answers."""
    folder = tmp_path_factory.mktemp("early")
    plan = write_plan(folder / "run", recorder_mar, threshold=0.4)
    plain, early = folder / "plain.yaml", folder / "early.yaml"
    plain.write_text(WORKERS.format(n=2))
    early.write_text(WORKERS.format(n=2).replace("batchSize: 4", "batchSize: 16")
                     + "  answers: early\n  sampling_rate: 0.5\n")
    build_untried(ArchiveRequest(str(recorder_mar), folder, plan=plan, version="3.0", config=plain))
    said: list[str] = []
    build_untried(ArchiveRequest(str(recorder_mar), folder, plan=plan, version="4.0", config=early), said.append)
    assert [line for line in said if "continuousBatching: true, minWorkers: 1, maxWorkers: 1" in line]
    return folder


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EARLY_EXIT_SECRET", SECRET)
        server = TorchServe(store, state, Addresses.free(), records=state / "records", models=["digits-3.0.mar"])
        with server as running:
            assert running.secret_file.read_text().strip() == SECRET
            yield running


def test_a_roll_under_load_to_early_answers_loses_nothing_and_changes_no_answer(
        server: TorchServe, management: Management, store: Path) -> None:
    plain = send(server, "digits", BODIES)
    with BackgroundLoad(server, "digits", BODIES) as load:
        roll(management, store / "digits-4.0.mar", longest_batch_s=1)
    assert failed(load.replies) == 0
    [status] = management.versions("digits")
    assert (status.version, status.n_workers) == ("4.0", 1), "the version before had two"
    early = send(server, "digits", BODIES, clients=12)
    assert failed(early) == 0
    assert [reply.exit for reply in early] == [reply.exit for reply in plain]
    assert len({reply.exit for reply in early}) > 2
    for one, other in zip(plain, early):
        assert json.loads(one.body) == pytest.approx(json.loads(other.body), abs=1e-4)


def ask(server: TorchServe, version: str, body: bytes, headers: dict[str, str]) -> requests.Response:
    """Send a request with the inference key and further headers, as any client of the server may."""
    token = {"Authorization": f"Bearer {read_token(server.key_file, 'inference')}"}
    reply = requests.post(f"{server.addresses.inference}/predictions/digits/{version}", data=body, timeout=20,
                          headers={**token, **headers})
    assert reply.status_code == 200, reply.text
    return reply


def opinions(server: TorchServe, version: str, body: bytes) -> tuple[str, list[dict[str, object]]]:
    """Ask a version for the predictions of all its exits; return the exit that answered, and the predictions."""
    reply = ask(server, version, body, {"X-Early-Exit-Anytime": "1",
                                        "X-Early-Exit-Secret": SECRET})
    return reply.headers["X-Early-Exit"], json.loads(reply.headers["X-Early-Exit-Opinions"])


def counted(server: TorchServe, name: str) -> float:
    """Return the sum of a counter over all versions and labels."""
    return sum(float(line.split()[-1]) for line in metrics(server).splitlines() if line.startswith(f"{name}{{"))


def test_the_operator_hears_every_exit_whenever_answers_leave_and_clients_force_no_full_pass(
        server: TorchServe, management: Management, store: Path) -> None:
    """A version with the same exits and plain batching serves beside the version with early answers."""
    management.register("digits-3.0.mar", RunSettings(workers=(1, 1)))
    wait_until(lambda: [one for one in management.versions("digits") if one.version == "3.0" and one.n_ready],
               "the worker does not start", limit_s=120, every_s=0.5)
    n_before = counted(server, "ee_anytime_answers_total")
    for body in BODIES[:4]:
        (early, said), (plain, said_plainly) = (opinions(server, version, body) for version in ("4.0", "3.0"))
        assert early == plain and [one["exit"] for one in said] == [one["exit"] for one in said_plainly]
        assert said[-1]["exit"] == "full" and len(said) > 2 and early in [one["exit"] for one in said]
        for one, other in zip(said, said_plainly):
            assert one == pytest.approx(other, abs=2e-4)
    wait_until(lambda: counted(server, "ee_anytime_answers_total") >= n_before + 8, "the answers are not counted")
    for header in ("X-Early-Exit-Anytime", "X-Early-Exit-Probe"):
        for secret in ({}, {"X-Early-Exit-Secret": "guessed"}, {"X-Early-Exit-Secret": ""}):
            replies = [ask(server, version, BODIES[0], {header: "1", **secret}) for version in ("4.0", "3.0")]
            for reply in replies:
                assert len(reply.json()) == 3 and reply.headers["X-Early-Exit"] != "", "its class, as ever"
                assert "X-Early-Exit-Opinions" not in reply.headers and "probe" not in reply.json()
    for version in ("4.0", "3.0"):  # metrics come late, but in order
        opinions(server, version, BODIES[0])
    wait_until(lambda: counted(server, "ee_anytime_answers_total") >= n_before + 10, "the answers are not counted")
    assert counted(server, "ee_anytime_answers_total") == n_before + 10, "requests without the secret heard every exit"
    token = {"Authorization": f"Bearer {read_token(server.key_file, 'management')}"}
    described = requests.get(f"{server.addresses.management}/models/digits/all", headers=token, timeout=20).text
    assert "modelVersion" in described and SECRET not in described
    logs = [file.read_text(errors="replace") for file in (server.state / "logs").rglob("*") if file.is_file()]
    assert any("open_headers" in log for log in logs) and not any(SECRET in log or "guessed" in log for log in logs)
    management.unregister("digits", "3.0")


def test_bad_items_fail_alone(server: TorchServe) -> None:
    bodies = [b"not an image" if number % 5 == 2 else body for number, body in enumerate(BODIES)]
    replies = send(server, "digits", bodies, clients=12)
    assert [reply.status for reply in replies] == [400 if body == b"not an image" else 200 for body in bodies]


def test_shadow_samples_are_recorded_and_counted(server: TorchServe) -> None:
    deadline = time.monotonic() + 20
    while not (shards := [shard for shard in list_shards(server.state / "records") if shard.name.startswith("4.0")]):
        assert time.monotonic() < deadline, "no records"
        time.sleep(0.5)
        send(server, "digits", BODIES[:4])
    records = read_shard(shards[0], [])
    assert len(records) and (records.exit >= 0).any(), "samples of requests that left early reach the end too"
    assert 'ee_shadow_samples_total{ModelName="digits",ModelVersion="4.0"' in metrics(server)


def test_clients_that_go_away_delay_nobody(server: TorchServe) -> None:
    """Clients that stay wait as long beside clients that have gone as beside clients that wait for their answers."""
    ask(server, "4.0", BODIES[0], {})
    others = BODIES[:16]
    n_before = counted(server, "ee_answers_total")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(send, server, "digits", others, clients=len(others))
        usual = send(server, "digits", BODIES)
        assert failed(waiting.result()) == 0
    n_usual = len(BODIES) + len(others)
    wait_until(lambda: counted(server, "ee_answers_total") >= n_before + n_usual, "the answers are not counted")
    host, port = server.addresses.inference.removeprefix("http://").split(":")
    token = read_token(server.key_file, "inference")
    for body in others:
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(f"POST /predictions/digits HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
                         f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    replies = send(server, "digits", BODIES)
    assert failed(replies) == 0
    first, usual_first = (median(reply.latency_s for reply in of[:8]) for of in (replies, usual))
    assert first < 3 * usual_first + 0.1, "they wait for those that have gone"
    wait_until(lambda: counted(server, "ee_answers_total") >= n_before + 2 * n_usual,
               "the worker did not answer those that have gone")


def test_a_second_worker_is_refused_and_the_first_goes_on(server: TorchServe) -> None:
    token = {"Authorization": f"Bearer {read_token(server.key_file, 'management')}"}
    requests.put(f"{server.addresses.management}/models/digits/4.0", headers=token, timeout=10,
                 params={"min_worker": 2, "max_worker": 2})
    log = server.state / "logs" / "model.log"
    wait_until(lambda: "early answers need exactly one worker" in log.read_text(), "the second worker is not refused",
               every_s=0.5)
    assert failed(send(server, "digits", BODIES, clients=12)) == 0
