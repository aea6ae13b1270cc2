"""A real TorchServe: answers, headers, metrics, records, and what a bad item or a bad folder costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import psutil
import pytest
import requests

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.switch.cli import main as switch_exits
from early_exit.archiver.torchserve.addresses import Addresses, free_ports
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.errors import ServerError
from early_exit.handler.recording.format import list_shards, read_shard
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.sample_request import Part, SampleRequest
from early_exit.training.environment import GATEWAY_TOKEN
from tests.conftest import WORKERS
from tests.support.client import BackgroundLoad, failed, metrics, send, session_of
from tests.support.digits import traffic
from tests.support.plans import write_plan
from tests.support.rewritten import renumbered
from tests.support.untried import build_untried
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

CONFIG = """inference_address=http://0.0.0.0:1
max_request_size=20000
cors_allowed_origin=https://page.example
metrics_config={}
grpc_inference_port={}
grpc_management_port={}
"""
METRICS = """ts_metrics:
  counter:
    - {name: Requests2XX, unit: Count, dimensions: [Level, Hostname]}
model_metrics:
  gauge:
    - {name: HandlerTime, unit: ms, dimensions: [ModelName, Level]}
"""
BODIES = [request.body for request in traffic(60, seed=5)]


@pytest.fixture(scope="module")
def store(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with digits 2.0 (records, two workers), 3.0 (exits) and 4.0 (exits)."""
    folder = tmp_path_factory.mktemp("served")
    config = folder / "config.yaml"
    config.write_text(WORKERS.format(n=2) + "  keep_requests: true\n")
    build_untried(ArchiveRequest(str(recorder_mar), folder, version="2.0", config=config))
    plan = write_plan(folder / "run", recorder_mar, threshold=0.3)
    exiting = build_untried(ArchiveRequest(str(recorder_mar), folder, plan=plan, version="3.0"))
    renumbered(exiting, folder / "digits-4.0.mar", "3.0", "4.0")
    return folder


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A server that is started with the umask 0, the gateway's token in its environment, and a user's settings."""
    folder, umask = tmp_path_factory.mktemp("server"), os.umask(0)
    (folder / "metrics.yaml").write_text(METRICS)
    config = folder / "config.properties"
    config.write_text(CONFIG.format(folder / "metrics.yaml", *free_ports(2)))
    started = TorchServe(store, folder / "state", Addresses.free(), records=folder / "records",
                         models=["digits-2.0.mar"], config=config)
    try:
        with mock.patch.dict(os.environ, {GATEWAY_TOKEN: "secret", "OF_THE_HANDLER": "seen"}), started:
            yield started
    finally:
        os.umask(umask)
    assert not started.key_file.exists(), "its tokens end with the server"


def test_two_workers_answer_and_record_every_request(server: TorchServe, management: Management) -> None:
    wait_until(lambda: management.versions("digits")[0].n_ready >= 2, "the second worker does not start", every_s=0.5)
    replies = send(server, "digits", BODIES, clients=16)
    assert failed(replies) == 0
    assert {(reply.exit, reply.version) for reply in replies} == {("full", "2.0")}
    assert all(len(json.loads(reply.body)) == 3 for reply in replies), "the handler's own response schema"
    records = server.state.parent / "records"
    deadline = time.monotonic() + 20
    while (found := sum(len(read_shard(shard, [])) for shard in list_shards(records))) < len(BODIES):
        assert time.monotonic() < deadline, f"{found} of {len(BODIES)} records"
        time.sleep(0.5)
    shards = [read_shard(shard, [], kept=True) for shard in list_shards(records)]
    assert sorted(KeptRequest.from_bytes(request).item["body"] for shard in shards
                  for request in shard.kept or ()) == sorted(BODIES)
    writers = {shard.name.split("-")[1] for shard in list_shards(records)}
    assert len(writers) == 2, "both workers record"


def test_a_form_reaches_the_handler_with_the_types_of_its_parts_and_is_recorded_as_that(
        server: TorchServe, management: Management) -> None:
    """The handler reads the part that is named data."""
    options, note = {"k": [1, None, 2.5]}, "a note — of ours"
    parts = (Part(BODIES[0], "image/png", "data"), Part(json.dumps(options).encode(), "application/json", "options"),
             Part(note.encode(), "text/plain", "a note"))
    named = management.named_requests("digits", "2.0")
    form = management.predict("digits", "2.0", SampleRequest(parts))
    [plain] = send(server, "digits", BODIES[:1])
    assert form.body == plain.body
    assert named is not None
    wait_until(lambda: management.named_requests("digits", "2.0") == named + 1, "one of the two named it", every_s=0.2)
    expected = KeptRequest({"data": bytearray(BODIES[0]), "options": options, "a note": note},
                           {part.name: part.content_type for part in parts})
    records, deadline = server.state.parent / "records", time.monotonic() + 20
    while expected not in (kept := [KeptRequest.from_bytes(request) for shard in list_shards(records)
                                    for request in read_shard(shard, [], kept=True).kept or ()]):
        assert time.monotonic() < deadline, kept[-1]
        time.sleep(0.5)


def test_one_bad_item_gets_its_own_400_and_the_others_are_answered(server: TorchServe) -> None:
    bodies = [b"not an image" if number % 5 == 2 else body for number, body in enumerate(BODIES)]
    replies = send(server, "digits", bodies)
    for body, reply in zip(bodies, replies):
        if body == b"not an image":
            assert reply.status == 400
            error = json.loads(reply.body)
            assert error["code"] == 400 and "UnidentifiedImageError" in error["message"]
        else:
            assert reply.ok


def test_the_metrics_tell_exits_records_shadows_and_stage_seconds(server: TorchServe) -> None:
    send(server, "digits", BODIES)
    deadline = time.monotonic() + 15
    while "ee_records_written_total" not in metrics(server) and time.monotonic() < deadline:
        send(server, "digits", BODIES[:4])
        time.sleep(1)
    text = metrics(server)
    for name in ('ee_answers_total{ModelName="digits",ModelVersion="2.0",Exit="full"', "ee_records_written_total",
                 "ee_shadow_samples_total", "ee_stage_seconds_bucket", "ee_items_refused_total"):
        assert name in text


def test_the_users_settings_count_and_the_users_metrics_stand_beside_ours(server: TorchServe) -> None:
    url = f"{server.addresses.inference}/predictions/digits"
    answered = session_of(server).post(url, data=BODIES[0], timeout=30)
    assert answered.headers["Access-Control-Allow-Origin"] == "https://page.example"
    assert session_of(server).post(url, data=bytes(20_001), timeout=30).status_code == 413
    config = (server.state.parent / "config.properties").read_text()
    for kind, address in server.grpc_addresses.items():
        host, port = address.split(":")
        assert host == "127.0.0.1" and f"grpc_{kind}_port={port}\n" in config
        socket.create_connection((host, int(port)), timeout=10).close()
    deadline, wanted = time.monotonic() + 20, ["Requests2XX{", "HandlerTime{", "ee_answers_total{",
                                               'ts_inference_requests_total{model_name="digits"']
    while missing := [name for name in wanted if name not in metrics(server)]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)
    assert "Requests4XX" not in metrics(server), "the user's file does not name it"


def test_without_a_token_nothing_is_answered(server: TorchServe) -> None:
    url = f"{server.addresses.inference}/predictions/digits"
    assert requests.post(url, data=BODIES[0], timeout=10).status_code == 400


def test_tokens_logs_and_records_are_for_this_user_alone_whatever_the_umask(server: TorchServe) -> None:
    records = server.state.parent / "records"
    for folder in (server.state, server.state / "logs", server.state / "tmp", records, *records.glob("*/*/")):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    assert server.key_file.stat().st_mode & 0o777 == 0o600


def test_each_log_has_a_limit(server: TorchServe) -> None:
    logs = ElementTree.parse(server.state / "log4j2.xml").iter("RollingFile")
    limits = {log.get("fileName"): (log.find(".//SizeBasedTriggeringPolicy").get("size"),  # type: ignore[union-attr]
                                    log.find("DefaultRolloverStrategy").get("max"))  # type: ignore[union-attr]
              for log in logs}
    assert limits == {str(server.state / "logs" / f"{name}.log"): ("20 MB", "3") for name in ("server", "model")}


def test_workers_see_the_variables_of_ee_serve_but_not_the_gateways_token(server: TorchServe) -> None:
    workers = server.workers()
    assert workers
    for variables in (worker.environ() for worker in workers):
        assert variables["OF_THE_HANDLER"] == "seen" and GATEWAY_TOKEN not in variables


@pytest.mark.parametrize("way_up", [None, "..", "%2e%2e"], ids=["by its own path", "dots", "dots in escapes"])
def test_archives_from_elsewhere_cannot_be_registered(
        way_up: str | None, server: TorchServe, management: Management, recorder_mar: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copy(recorder_mar, tmp_path / "elsewhere.mar"))
    way = os.path.relpath(elsewhere, server.model_store)
    url = elsewhere.as_uri() if way_up is None else f"file://{server.model_store}/{way.replace('..', way_up)}"
    with pytest.raises(ServerError, match=r"was answered with 40[034]"):
        management.register(url, RunSettings(workers=(1, 1)), model="elsewhere")
    assert not (server.model_store / elsewhere.name).exists()


def test_a_roll_under_load_loses_no_request_and_the_new_version_exits(
        server: TorchServe, management: Management, store: Path) -> None:
    with BackgroundLoad(server, "digits", BODIES) as load:
        time.sleep(1)
        report = roll(management, store / "digits-3.0.mar", longest_batch_s=1)
        time.sleep(1)
    assert (report.version, report.replaced) == ("3.0", "2.0")
    assert failed(load.replies) == 0
    assert [reply.version for reply in load.replies][-1] == "3.0"
    assert {reply.version for reply in load.replies} == {"2.0", "3.0"}
    assert any(reply.exit not in ("full", "") for reply in load.replies)
    assert [one.version for one in management.versions("digits")] == ["3.0"]


def test_an_answer_does_not_depend_on_the_batch_it_travelled_in(server: TorchServe) -> None:
    """Scores agree except for rounding, which depends on the batch; exits are the same."""
    alone, together = send(server, "digits", BODIES, clients=1), send(server, "digits", BODIES, clients=8)
    assert len({reply.exit for reply in alone}) > 1
    assert [reply.exit for reply in alone] == [reply.exit for reply in together]
    for one, other in zip(alone, together):
        assert json.loads(one.body) == pytest.approx(json.loads(other.body), abs=1e-4)


def test_a_version_that_fails_its_smoke_test_is_removed_and_the_old_one_serves(
        server: TorchServe, management: Management, store: Path) -> None:
    before = management.versions("digits")
    with BackgroundLoad(server, "digits", BODIES) as load, pytest.raises(ServerError, match="keeps serving"):
        roll(management, store / "digits-4.0.mar", request=SampleRequest((Part(b"not an image"),)))
    assert failed(load.replies) == 0
    assert [one.version for one in management.versions("digits")] == [one.version for one in before]


def test_a_version_that_never_gets_ready_is_removed_and_the_old_one_serves(
        server: TorchServe, management: Management, store: Path) -> None:
    with BackgroundLoad(server, "digits", BODIES) as load, pytest.raises(ServerError, match="not ready within 1 s"):
        roll(management, store / "digits-4.0.mar", ready_limit_s=1)
    assert failed(load.replies) == 0
    assert "4.0" not in [one.version for one in management.versions("digits")]


def test_a_version_that_is_registered_already_is_refused(management: Management, store: Path) -> None:
    with pytest.raises(ServerError, match="registered already"):
        roll(management, store / "digits-3.0.mar")


def test_exits_that_are_switched_off_stay_off_through_a_roll(
        server: TorchServe, management: Management, store: Path) -> None:
    place = ["--switches", str(server.switches)]
    assert any(reply.exit != "full" for reply in send(server, "digits", BODIES))
    assert switch_exits(["digits", "off", *place]) == 0
    assert {(reply.exit, reply.version) for reply in send(server, "digits", BODIES)} == {("full", "3.0")}
    roll(management, store / "digits-4.0.mar", longest_batch_s=1)
    assert {(reply.exit, reply.version) for reply in send(server, "digits", BODIES)} == {("full", "4.0")}
    told = metrics(server)
    for version in ("3.0", "4.0"):
        assert re.search(rf'ee_exits_switched{{ModelName="digits",ModelVersion="{version}".*}} -1.0', told)
    assert switch_exits(["digits", "on", *place]) == 0
    assert any(reply.exit != "full" for reply in send(server, "digits", BODIES))


def test_a_records_folder_that_cannot_be_written_costs_no_answer(store: Path, tmp_path: Path) -> None:
    """A file stands where the model's folder should be, so that writing fails even for root."""
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "digits").write_text("")
    with TorchServe(store, tmp_path / "state", Addresses.free(), records=tmp_path / "records",
                    models=["digits-2.0.mar"]) as server:
        assert failed(send(server, "digits", BODIES)) == 0
        deadline = time.monotonic() + 20
        while not re.search(r"ee_records_dropped_total{.*} [1-9]", metrics(server)):
            assert time.monotonic() < deadline
            time.sleep(1)
            assert failed(send(server, "digits", BODIES[:8])) == 0
        log = (server.state / "logs" / "model.log").read_text()
        workers = server.workers()
    assert 1 <= log.count("cannot write records to") <= 2, "one line per worker"
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def test_a_wrong_setting_is_named_in_the_log_at_load(recorder_mar: Path, tmp_path: Path) -> None:
    """`ee-archive` refuses a wrong setting, so the test adds it to the finished archive."""
    import zipfile

    store = tmp_path / "store"
    store.mkdir()
    with zipfile.ZipFile(recorder_mar) as source, zipfile.ZipFile(store / "wrong.mar", "w") as sink:
        for name in source.namelist():
            content = source.read(name)
            sink.writestr(name, content + b"  pol: 2\n" if name == "model-config.yaml" else content)
    with TorchServe(store, tmp_path / "state", Addresses.free(), models=["wrong.mar"]) as server:
        log = server.state / "logs" / "model.log"
        wait_until(lambda: log.exists() and "early_exit.pol in model-config.yaml" in log.read_text(),
                   "the error is not in the model log", every_s=0.5)
