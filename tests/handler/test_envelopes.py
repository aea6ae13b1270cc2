"""Requests in TorchServe's envelopes: each gets as many answers as before, and no instance gets another's answer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ts.torch_handler.request_envelope.json import JSONEnvelope
from ts.torch_handler.request_envelope.kserve import KServeEnvelope
from ts.torch_handler.request_envelope.kservev2 import KServev2Envelope

from early_exit.archiver.torchserve import api
from early_exit.handler.config import ServingConfig
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import MONITOR_FILES, read_state
from early_exit.handler.protocol import EXIT_HEADER, PROBE_BODY, PROBE_HEADER, SECRET_HEADER, SECRET_VARIABLE
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.format import ANONYMOUS, Records, list_shards, read_shard, request_hash
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.user_handler.description import HandlerDescription
from tests.support.host import MemoryHost, worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, Augmenting, backbone_of_rows, requests
from tests.support.torchserve_context import OVER_HTTP, predict, service_of

ROWS = [{"rows": numbers} for numbers in requests(6)]
ENVELOPES = {"json": JSONEnvelope, "kserve": KServeEnvelope, "kservev2": KServev2Envelope}


@pytest.fixture(scope="module")
def model() -> EarlyExitModel:
    backbone = backbone_of_rows()
    return build_model(backbone, *random_exits(backbone), sampling_rate=1.0, record_layers=8)


def request(instances: list[Any], kind: str = "json") -> dict[str, Any]:
    """Return a request in an envelope, as TorchServe parses it from JSON."""
    if kind == "kservev2":
        return {"body": {"inputs": [{"name": f"input-{number}", "shape": [len(one["rows"])], "datatype": "FP32",
                                     "data": one["rows"]} for number, one in enumerate(instances)]}}
    return {"body": {"instances": instances}}


class OfInputs(AtOnce):
    """The same handler, written for the second protocol of KServe, which passes named tensors."""

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return super().handle([{"rows": one["data"]} for one in data], context)


def handler_of(kind: str, model: EarlyExitModel) -> AtOnce:
    return OfInputs(model) if kind == "kservev2" else AtOnce(model)


@pytest.mark.parametrize("kind", ENVELOPES)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_request_of_several_instances_is_answered_as_by_the_handler_alone(
        kind: str, count: int, model: EarlyExitModel) -> None:
    handler = handler_of(kind, model)
    expected, _ = predict(ENVELOPES[kind](handler.handle).handle, [request(ROWS[:count], kind)])
    model.log.take()
    found, context = predict(ENVELOPES[kind](service_of(worker_of(model, handler)).handle).handle,
                             [request(ROWS[:count], kind)])
    assert found == expected and EXIT_HEADER in context.get_response_headers(0)
    assert context.get_response_status(0)[0] == 200


class OfTwoInputs(AtOnce):
    """A handler that makes one row and one answer from two named inputs."""

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return super().handle([{"rows": data[0]["data"]}], context)


class AllInOne(AtOnce):
    """A handler that gives one answer to all instances, in a form that only KServe's first protocol accepts."""

    def handle(self, data: list[Any], context: Any) -> Any:
        return {"classes": super().handle(data, context)}


@pytest.mark.parametrize(("kind", "handler"), [("kservev2", OfTwoInputs), ("kserve", AllInOne)])
def test_how_many_answers_a_request_in_an_envelope_has_is_the_handlers_choice(
        kind: str, handler: type[AtOnce], model: EarlyExitModel) -> None:
    expected, _ = predict(ENVELOPES[kind](handler(model).handle).handle, [request(ROWS[:2], kind)])
    model.log.take()
    found, context = predict(ENVELOPES[kind](service_of(worker_of(model, handler(model))).handle).handle,
                             [request(ROWS[:2], kind)])
    assert found == expected and context.get_response_status(0)[0] == 200
    assert EXIT_HEADER in context.get_response_headers(0)


def test_requests_of_several_instances_in_one_batch_are_answered_and_their_records_name_no_request(
        model: EarlyExitModel, tmp_path: Path) -> None:
    host = MemoryHost()
    worker = worker_of(model, AtOnce(model), ServingConfig(records=str(tmp_path)), host)
    batch = [request(ROWS[:2]), request(ROWS[2:3]), request(ROWS[3:])]
    expected, _ = predict(JSONEnvelope(AtOnce(model).handle).handle, batch)
    found, context = predict(JSONEnvelope(service_of(worker).handle).handle, batch)
    worker.close()
    assert found == expected and not any(context.get_response_headers(item) for item in range(3))
    [records] = [read_shard(path, []) for path in list_shards(tmp_path)]
    assert records.request.tolist() == [ANONYMOUS] * 6
    assert host.value("rows_unknown", "envelope") == 1


@pytest.mark.parametrize("kind", [AtOnce, Augmenting])
def test_each_instance_of_a_request_is_recorded_with_its_number(
        kind: type[AtOnce], model: EarlyExitModel, tmp_path: Path) -> None:
    worker = worker_of(model, kind(model), ServingConfig(records=str(tmp_path), keep_requests=True),
                       description=HandlerDescription(rows_per_request=kind.rows_per_request))
    predict(JSONEnvelope(service_of(worker).handle).handle, [request(ROWS[:4])])
    worker.close()
    [records] = [read_shard(path, [], kept=True) for path in list_shards(tmp_path)]
    assert records.request.tolist() == [request_hash("id-0")] * 4
    assert sorted(records.row.tolist()) == [0, 1, 2, 3]
    assert records.kept is not None
    kept = {number: KeptRequest.from_bytes(one).item for number, one in zip(records.row.tolist(), records.kept)}
    assert [kept[number] for number in range(4)] == ROWS[:4]


def sampled(batches: list[list[dict[str, Any]]], rate: float, folder: Path) -> tuple[list[Records], MonitorState]:
    """Let a worker that samples answer batches of requests; return its shards and its monitor's state."""
    backbone = backbone_of_rows()
    plan, heads = random_exits(backbone)
    plan = replace(plan, thresholds="certified", certificate=Certificate(
        Risk.DISAGREEMENT, 0.9, 0.95, 1500, 19, 0.0127, 0.03, "fixed-sequence", (1.0, 2.0)))
    sampling = build_model(backbone, plan, heads, sampling_rate=rate, record_layers=8)
    worker = worker_of(sampling, AtOnce(sampling), ServingConfig(records=str(folder)),
                       description=HandlerDescription(rows_per_request=1))
    service, n_before = service_of(worker), 0
    for batch in batches:
        ids = [f"id-{n_before + number}" for number in range(len(batch))]
        predict(JSONEnvelope(service.handle).handle, batch, ids=ids)
        n_before += len(batch)
    worker.close()
    [file] = folder.rglob(MONITOR_FILES)
    state = read_state(file)
    assert state is not None
    return [read_shard(path, []) for path in list_shards(folder)], state


def test_requests_are_sampled_at_the_same_rate_however_many_instances_they_have(tmp_path: Path) -> None:
    n, rate = 600, 0.3
    small = [number % 2 == 0 for number in range(n)]
    shards, state = sampled([[request(ROWS[:1 if one else 6])] for one in small], rate, tmp_path)
    recorded = {hash_ for shard in shards for hash_ in shard.request.tolist()}
    of_small = sum(one and request_hash(f"id-{number}") in recorded for number, one in enumerate(small))
    for found in (of_small, len(recorded) - of_small):
        assert abs(found - rate * n / 2) < 4 * math.sqrt(n / 2 * rate * (1 - rate))
    assert state.evidence.n == len(recorded), "the monitor bets once on each request, not once on each instance"
    assert sum(map(len, shards)) > 1.2 * len(recorded), "and each sampled instance of these requests is recorded"


def test_instances_of_unknown_requests_are_one_sample_because_all_may_be_of_one_request(tmp_path: Path) -> None:
    batch = [request(ROWS[:2]), request(ROWS[2:])]
    shards, state = sampled([batch] * 40, 1.0, tmp_path)
    assert sum(map(len, shards)) == 6 * 40 and state.evidence.n == 40


@pytest.mark.parametrize("rows_per_request", [1, None])
def test_equal_requests_have_equal_contents_whether_or_not_rows_are_known(
        rows_per_request: int | None, model: EarlyExitModel, tmp_path: Path) -> None:
    worker = worker_of(model, AtOnce(model), ServingConfig(records=str(tmp_path)),
                       description=HandlerDescription(rows_per_request=rows_per_request))
    for rows in (ROWS[:2], ROWS[2:4], ROWS[:2]):
        predict(JSONEnvelope(service_of(worker).handle).handle, [request(rows)])
    worker.close()
    [records] = [read_shard(path, []) for path in list_shards(tmp_path)]
    first, second, again = records.content.view(3, 2).tolist()
    assert first == again and not {*first} & {*second} and UNKNOWN_CONTENT not in (*first, *second)
    assert (first[0] == first[1]) == (rows_per_request is None), "then it is that of the whole request"


@pytest.mark.parametrize("kind", ENVELOPES)
def test_a_probe_is_answered_in_every_envelope(
        kind: str, model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "the operator's")
    headers = {**OVER_HTTP, PROBE_HEADER: "1", SECRET_HEADER: "the operator's"}
    [answer], context = predict(ENVELOPES[kind](service_of(worker_of(model, AtOnce(model))).handle).handle,
                                [{"body": json.loads(PROBE_BODY)}], headers=[headers])
    said = json.loads(answer) if isinstance(answer, str) else answer
    assert api._out_of_envelope(json.loads(json.dumps(said)))["probe"] == "ok"
    assert context.get_response_status(0)[0] == 200


@pytest.mark.parametrize("kind", ENVELOPES)
def test_an_error_comes_in_the_envelope_that_answers_come_in(kind: str, model: EarlyExitModel) -> None:
    bad = request([{"rows": ["no number"]}], kind) if kind != "kservev2" else {"body": {"inputs": [
        {"name": "input-0", "shape": [1], "datatype": "BYTES", "data": ["no number"]}]}}
    [answer], context = predict(
        ENVELOPES[kind](service_of(worker_of(model, handler_of(kind, model))).handle).handle, [bad])
    said = json.loads(answer) if isinstance(answer, str) else answer
    assert api._out_of_envelope(said)["code"] == context.get_response_status(0)[0] == 400


def test_with_early_answers_a_batch_of_several_instances_is_answered_at_once() -> None:
    backbone = backbone_of_rows()
    early = build_model(backbone, *random_exits(backbone), answers="early")
    service = service_of(worker_of(early, AtOnce(early), ServingConfig(answers="early")))
    batch = [request(ROWS[:2]), request(ROWS[2:3]), request(ROWS[3:])]
    for requests_ in (batch, batch[:1], batch):
        expected, _ = predict(JSONEnvelope(AtOnce(early).handle).handle, requests_)
        found, _ = predict(JSONEnvelope(service.handle).handle, requests_)
        assert found == expected
