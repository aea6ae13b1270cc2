"""No request gets the header, record, label or bytes of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import (
    ANYTIME_HEADER,
    CONFIDENCE_HEADER,
    EXIT_HEADER,
    OPINIONS_HEADER,
    SECRET_HEADER,
    SECRET_VARIABLE,
)
from early_exit.handler.recording.format import ANONYMOUS, Records, list_shards, read_shard, request_hash
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.serving import ownership
from early_exit.handler.user_handler.description import HandlerDescription
from tests.support.host import MemoryHost, worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import (
    AtOnce,
    Augmenting,
    AugmentingOneByOne,
    CallingTwice,
    OneByOne,
    Reversing,
    SortingByLength,
    alone,
    backbone_of_rows,
    calls_of,
    replied,
    requests,
    told,
    views,
)

KNOWN: list[type[AtOnce]] = [AtOnce, OneByOne, Augmenting, AugmentingOneByOne]
UNKNOWN = HandlerDescription(rows_per_request=None, rows_unknown_because="the handler makes 2 rows of one request")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbone_of_rows()


@pytest.fixture
def model(backbone: Backbone) -> EarlyExitModel:
    """Return a model in which some rows leave at each exit and some do not leave early; it records every row."""
    return build_model(backbone, *random_exits(backbone), sampling_rate=1.0, record_layers=8)


@pytest.fixture
def checking_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_ONE_IN", 1)


def recorded(folder: Path) -> list[Records]:
    return [read_shard(path, [], kept=True) for path in list_shards(folder)]


@pytest.mark.parametrize("kind", KNOWN)
def test_a_request_is_told_in_a_batch_what_it_is_told_alone(
        kind: type[AtOnce], model: EarlyExitModel, checking_every_batch: None) -> None:
    handler, host = kind(model), MemoryHost()
    calls = calls_of(requests(12))
    description = HandlerDescription(rows_per_request=kind.rows_per_request)
    worker = worker_of(model, handler, host=host, description=description)
    for first in range(0, 12, 4):
        batch, single = replied(worker, calls[first:first + 4]), alone(model, handler, calls[first:first + 4])
        assert told(batch) == told(single) and all(EXIT_HEADER in reply.headers for reply in batch)
        assert [reply.body for reply in batch] == [reply.body for reply in single]
    assert not host.metrics["rows_unknown"].values, "no check may find a contradiction that is none"


def test_a_request_of_several_rows_left_with_the_last_of_them_and_is_as_sure_as_the_least(
        model: EarlyExitModel) -> None:
    calls = calls_of(requests(20))
    order = [*model.assembly.layers, "full"]
    mixed = 0
    for call, reply in zip(calls, alone(model, Augmenting(model), calls)):
        rows = alone(model, AtOnce(model), calls_of([one.tolist() for one in views(call.inputs)]))
        exits = [one.headers[EXIT_HEADER] for one in rows]
        mixed += len(set(exits)) > 1
        assert reply.headers[EXIT_HEADER] == max(exits, key=order.index)
        assert reply.headers[CONFIDENCE_HEADER] == min(one.headers[CONFIDENCE_HEADER] for one in rows)
    assert mixed, "the test needs requests whose rows leave at several exits"


@pytest.mark.parametrize("kind", KNOWN)
def test_who_asks_for_every_exit_hears_of_its_own_rows(kind: type[AtOnce], model: EarlyExitModel,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "the operator's")
    model.shadow.rate = 0.0
    handler = kind(model)
    calls = calls_of(requests(6))
    calls[1::2] = calls_of(requests(6), **{ANYTIME_HEADER: "1", SECRET_HEADER: "the operator's"})[1::2]
    worker = worker_of(model, handler, description=HandlerDescription(rows_per_request=kind.rows_per_request))
    heard = [reply.headers.get(OPINIONS_HEADER) for reply in replied(worker, calls)]
    assert heard == [reply.headers.get(OPINIONS_HEADER) for reply in alone(model, handler, calls)]
    assert [one is not None for one in heard] == [False, True] * 3
    exits = [path for path, stage in zip(model.assembly.layers, model.assembly.stages) if stage.exit is not None]
    assert all([one["exit"] for one in json.loads(heard[number] or "")] == [*exits, "full"] for number in (1, 3, 5))


@pytest.mark.parametrize("kind", KNOWN)
def test_a_request_of_many_rows_is_recorded_as_often_as_others(
        kind: type[AtOnce], model: EarlyExitModel, tmp_path: Path) -> None:
    model.shadow.rate = 0.2
    worker = worker_of(model, kind(model), ServingConfig(records=str(tmp_path)),
                       description=HandlerDescription(rows_per_request=kind.rows_per_request))
    calls = calls_of(requests(480))
    for first in range(0, 480, 8):
        replied(worker, calls[first:first + 8])
    worker.close()
    n_recorded = sum(len(records.request) for records in recorded(tmp_path))
    assert abs(n_recorded - 0.2 * 480) < 4.5 * (480 * 0.2 * 0.8) ** 0.5, "6 in a million draws differ more"


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("kind", KNOWN)
def test_a_request_is_recorded_once_with_what_belongs_to_it(
        kind: type[AtOnce], rate: float, model: EarlyExitModel, backbone: Backbone, tmp_path: Path) -> None:
    model.shadow.rate = rate
    worker = worker_of(model, kind(model), ServingConfig(records=str(tmp_path), keep_requests=True),
                       description=HandlerDescription(rows_per_request=kind.rows_per_request))
    asked = requests(64)
    for first in range(0, 64, 8):
        replied(worker, calls_of(asked)[first:first + 8])
    worker.close()
    [records] = recorded(tmp_path)
    number_of = {request_hash(f"id-{number}"): number for number in range(64)}
    numbers = [number_of[hashed] for hashed in records.request.tolist()]
    assert len(set(numbers)) == len(numbers) and len(numbers) > 10
    assert [KeptRequest.from_bytes(kept).item for kept in records.kept or ()] == [
        {"rows": asked[number], "body": f"body-{number}".encode()} for number in numbers]
    k = kind.rows_per_request or 1
    assert records.sampling_rate.tolist() == pytest.approx([rate] * len(numbers))
    seen = set()
    for number, log_probabilities in zip(numbers, records.log_probabilities):
        rows = views({"rows": asked[number]})[:k]
        distances = (backbone.graph(rows).log_softmax(dim=1) - log_probabilities).abs().amax(dim=1)
        assert distances.min() < 0.02, "another request's"
        seen.add(int(distances.argmin()))
    assert seen == set(range(k)), "each row of a request may be the one that is recorded"


@pytest.mark.parametrize("kind", [Reversing, SortingByLength, CallingTwice])
def test_where_it_is_unknown_answers_stay_and_nothing_is_claimed(
        kind: type[AtOnce], model: EarlyExitModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    host = MemoryHost()
    handler = kind(model)
    worker = worker_of(model, handler, ServingConfig(records=str(tmp_path), keep_requests=True, anytime=True), host,
                       UNKNOWN)
    calls = calls_of(requests(6, lengths=(8, 5, 7)), **{ANYTIME_HEADER: "1"})
    for _ in range(2):
        batch = replied(worker, calls)
        assert [reply.body for reply in batch] == [reply.body for reply in alone(model, handler, calls)]
        assert not [name for reply in batch for name in reply.headers if name.startswith("X-Early-Exit")]
    [single] = replied(worker, calls[:1])
    assert EXIT_HEADER in single.headers, "it has the batch to itself"
    worker.close()
    [records] = recorded(tmp_path)
    n_calls = 2 if kind is CallingTwice else 1
    assert records.request.tolist() == [ANONYMOUS] * 12 * n_calls + [request_hash("id-0")]
    assert records.kept is not None and records.kept[:-1] == [b""] * 12 * n_calls
    assert KeptRequest.from_bytes(records.kept[-1]).item["body"] == b"body-0"
    assert len(set(records.time.tolist())) == 3, "one time for all that was served together"
    assert caplog.text.count("because the handler makes 2 rows of one request") == 1
    assert host.metrics["rows_unknown"].values == {("archive",): 1}
