"""Faults of production on a real TorchServe under load: no answer is wrong, few or none are lost, serving goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import RollReport, roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.metrics import read_metrics
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.errors import EarlyExitError, ServerError
from early_exit.handler.recording.format import list_shards, read_shard
from tests.support.client import BackgroundLoad, Reply, failed, metrics, send
from tests.support.digits import traffic
from tests.support.plans import write_plan
from tests.support.rewritten import renumbered, rewritten
from tests.support.skips import MAY_NOT_MOUNT
from tests.support.untried import build_untried
from tests.support.waiting import wait_until
from tests.support.workers import kill_worker, wait_until_ready

pytestmark = pytest.mark.slow

Answer = tuple[str, str]
"""The class, and the exit that answered."""
BODIES = [request.body for request in traffic(60, seed=15)]
CLIENTS = 8
RECORDS_PER_SHARD, BATCH = 32, 4
CONFIG = (f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {BATCH}\nmaxBatchDelay: 10\n"
          "early_exit:\n  sampling_rate: 0.5\n  control_rate: 0\n  seal_after_s: 1\n"
          f"  records_per_shard: {RECORDS_PER_SHARD}\n")


@pytest.fixture(scope="module")
def store(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with digits 2.0 to 6.0, all with the same exits."""
    folder = tmp_path_factory.mktemp("faults") / "store"
    folder.mkdir()
    config = folder.parent / "config.yaml"
    config.write_text(CONFIG)
    plan = write_plan(folder.parent / "run", recorder_mar, threshold=0.4)
    build_untried(ArchiveRequest(str(recorder_mar), folder, plan=plan, version="2.0", config=config))
    for version in ("3.0", "4.0", "5.0", "6.0"):
        renumbered(folder / "digits-2.0.mar", folder / f"digits-{version}.mar", "2.0", version)
    return folder


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[TorchServe]:
    state = store.parent / "state"
    with TorchServe(store, state, Addresses.free(), records=store.parent / "records",
                    models=["digits-2.0.mar"]) as running:
        wait_until_ready(running)
        yield running


@pytest.fixture(scope="module")
def expected(server: TorchServe) -> list[Answer]:
    answers = [answer(reply) for reply in send(server, "digits", BODIES)]
    assert len({left_at for _, left_at in answers}) > 2
    return answers


def answer(reply: Reply) -> Answer:
    return reply.top(), reply.exit


def default(management: Management) -> str:
    return next(one.version for one in management.versions("digits") if one.is_default)


@contextlib.contextmanager
def loaded(server: TorchServe, expected: list[Answer], *, may_fail: int = 0, pause_s: float = 0.02,
           ) -> Iterator[BackgroundLoad]:
    """Load the server from 8 clients while the block runs; no answer may be wrong, and at most `may_fail` may fail."""
    with BackgroundLoad(server, "digits", BODIES, clients=CLIENTS, pause_s=pause_s) as load:
        time.sleep(1)
        yield load
        time.sleep(1)
    assert failed(load.replies) <= may_fail, [reply for reply in load.replies if not reply.ok][:3]
    assert all(answer(reply) == expected[reply.number] for reply in load.replies if reply.ok)
    assert load.replies[-1].ok


def test_everything_listens_on_loopback(server: TorchServe) -> None:
    java = [process for process in server.workers() if process.name().startswith("java")]
    processes = [*java, *server.workers(), psutil.Process(server.workers()[0].ppid())]
    listening = {connection.laddr.ip for process in processes for connection in process.net_connections("inet")
                 if connection.status == psutil.CONN_LISTEN}
    assert listening and all(ip.endswith("127.0.0.1") for ip in listening)


def test_the_management_api_asks_for_its_own_token(server: TorchServe) -> None:
    with pytest.raises(ServerError, match="answered with 4"):
        Management(server.addresses, None).versions("digits")


def test_a_killed_worker_costs_at_most_what_it_had_taken(server: TorchServe, expected: list[Answer]) -> None:
    """It also costs the records that were not yet written: at most a shard, which ends with the batch that fills it."""
    records = server.state.parent / "records"
    time.sleep(2.5)  # until the earlier records are on disk
    before, counted = n_records(records), n_sampled(server)
    with loaded(server, expected, may_fail=4, pause_s=0.0):
        kill_worker(server)
        time.sleep(3)
    wait_until_ready(server)
    time.sleep(2.5)
    sampled = n_sampled(server) - counted
    unsealed = RECORDS_PER_SHARD - 1 + BATCH
    assert sampled > unsealed
    assert sampled - unsealed <= n_records(records) - before <= sampled + CLIENTS


def n_sampled(server: TorchServe) -> float:
    """Return how many shadow samples the server has counted. The end of a worker does not reset this count."""
    return sum(version.shadow for version in read_metrics(metrics(server))["digits"].values())


@pytest.mark.parametrize(("damage", "message"), [("cut short", "cannot read|damaged"), ("too new", "format 999"),
                                                 ("other weights", "was not ready within")])
def test_a_new_archive_that_is_damaged_leaves_the_old_one_serving(
        server: TorchServe, management: Management, store: Path, expected: list[Answer], damage: str,
        message: str) -> None:
    mar, good = store / "digits-9.0.mar", store / "digits-3.0.mar"
    before = default(management)
    if damage == "cut short":
        mar.write_bytes(good.read_bytes()[:20_000])
    else:
        def change(text: str) -> str:
            data = json.loads(text)
            return json.dumps({**data, "format": 999} if damage == "too new"
                              else {**data, "probe": [-score for score in data["probe"]]})

        damaged = rewritten(good, mar.with_suffix(".damaged"), **{"early_exit/backbone.json": change})
        renumbered(damaged, mar, "3.0", "9.0")
    with loaded(server, expected), pytest.raises(EarlyExitError, match=message):
        roll(management, mar, ready_limit_s=6)
    assert [(one.version, one.is_default) for one in management.versions("digits")] == [(before, True)]


def n_records(records: Path) -> int:
    found = 0
    for shard in list_shards(records):
        with contextlib.suppress(EarlyExitError):
            found += len(read_shard(shard, []))
    return found


def test_a_records_folder_that_goes_away_or_cannot_be_written_costs_no_answer_and_is_used_again(
        server: TorchServe, expected: list[Answer]) -> None:
    records = server.state.parent / "records"
    with loaded(server, expected):
        shutil.rmtree(records / "digits", ignore_errors=True)
        time.sleep(1)
        put_a_file_in_the_place_of(records / "digits")
        time.sleep(2)
        (records / "digits").unlink()
        time.sleep(3)
    assert n_records(records) > 0


def put_a_file_in_the_place_of(folder: Path) -> None:
    """Put a file there, so that not even root can write into the folder. The worker may recreate it meanwhile."""
    deadline = time.monotonic() + 30
    while not folder.is_file():
        assert time.monotonic() < deadline, "the worker is always faster"
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.write_text("")


def test_a_full_disk_costs_no_answer_and_recording_goes_on_when_there_is_room(
        server: TorchServe, expected: list[Answer]) -> None:
    records, log = server.state.parent / "records" / "digits", server.state / "logs" / "model.log"
    shutil.rmtree(records, ignore_errors=True)
    records.mkdir(parents=True, exist_ok=True)
    written_before = len(log.read_text())  # the previous test makes the worker complain, too
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(records)], capture_output=True,
                      check=False).returncode:
        pytest.skip(MAY_NOT_MOUNT)
    try:
        with loaded(server, expected):
            time.sleep(4)
            subprocess.run(["mount", "-o", "remount,size=64m", str(records)], check=True)
            before = n_records(records)
            wait_until(lambda: n_records(records) > before, "recording does not go on", limit_s=30, every_s=0.5)
        assert "cannot write records" in log.read_text()[written_before:]
    finally:
        subprocess.run(["umount", "-l", str(records)], check=True)


def test_two_rolls_of_one_archive_at_once_bring_it_in_once(
        server: TorchServe, management: Management, store: Path, expected: list[Answer]) -> None:
    outcomes = in_parallel([lambda: roll(management, store / "digits-3.0.mar", longest_batch_s=1.0)] * 2)
    assert default(management) == "3.0"
    assert sum(isinstance(outcome, ServerError) for outcome in outcomes) == 1, outcomes


def test_of_rolls_of_two_archives_at_once_one_succeeds_and_no_request_is_lost(
        server: TorchServe, management: Management, store: Path, expected: list[Answer]) -> None:
    with loaded(server, expected):
        outcomes = in_parallel([lambda: roll(management, store / "digits-4.0.mar", longest_batch_s=1.0),
                                lambda: roll(management, store / "digits-5.0.mar", longest_batch_s=1.0)])
    [report] = [outcome for outcome in outcomes if isinstance(outcome, RollReport)]
    assert [(one.version, one.is_default) for one in management.versions("digits")] == [(report.version, True)]


def in_parallel(calls: list[object]) -> list[object]:
    """Run the calls at once; return what each returned or raised."""
    outcomes: list[object] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            outcomes[number] = calls[number]()  # type: ignore[operator]
        except EarlyExitError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_a_roll_waits_for_batches_that_take_longer_than_it_was_told(
        server: TorchServe, management: Management, store: Path, expected: list[Answer]) -> None:
    for version in ("7.0", "8.0"):
        slow = rewritten(store / "digits-6.0.mar", store / "slow.mar", **{"digits_handler.py": slowed})
        renumbered(slow, store / f"digits-{version}.mar", "6.0", version)
    roll(management, store / "digits-7.0.mar", longest_batch_s=1.0)
    with loaded(server, expected):
        roll(management, store / "digits-8.0.mar", longest_batch_s=0.1)
    assert default(management) == "8.0"


def slowed(handler: str) -> str:
    """Return the code of a handler that takes 0.4 s per image."""
    assert "class DigitsClassifier" in handler
    return handler + ("\n    def preprocess(self, data):\n"
                      "        import time\n"
                      "        time.sleep(0.4 * len(data))\n"
                      "        return super().preprocess(data)\n")


def test_a_server_that_restarts_in_the_middle_of_a_roll_serves_what_it_was_started_with_and_can_be_rolled(
        server: TorchServe, management: Management, store: Path, expected: list[Answer]) -> None:
    outcomes: list[object] = []
    rolling = threading.Thread(target=lambda: outcomes.extend(in_parallel([
        lambda: roll(management, store / "digits-6.0.mar", longest_batch_s=1.0)])))
    rolling.start()
    deadline = time.monotonic() + 30
    while "6.0" not in [one.version for one in management.versions("digits")]:
        assert time.monotonic() < deadline and not outcomes, "the roll does not begin, or is over"
        time.sleep(0.05)
    server.stop()
    rolling.join()
    assert isinstance(outcomes[0], ServerError)
    with server:
        wait_until_ready(server)
        assert default(management) == "2.0"
        assert [answer(reply) for reply in send(server, "digits", BODIES)] == expected
        roll(management, store / "digits-6.0.mar", longest_batch_s=1.0)
        assert default(management) == "6.0"
