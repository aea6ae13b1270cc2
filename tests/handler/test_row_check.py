"""A worker notices by itself if its handler's rows are not in the order of the requests."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import EXIT_HEADER
from early_exit.handler.recording.format import ANONYMOUS, Records, list_shards, read_shard
from early_exit.handler.serving import ownership
from early_exit.handler.serving.ownership import DrawnRequest
from early_exit.handler.user_handler.alone import rows_alone
from early_exit.handler.user_handler.rows import RowsPerRequest, rows_per_request
from tests.support.host import MemoryHost, worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import (
    AtOnce,
    FilteringDuplicates,
    SortingByLength,
    alone,
    backbone_of_rows,
    calls_of,
    replied,
    requests,
    told,
)


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


def found_by_samples(model: EarlyExitModel, handler: AtOnce, a: list[float], b: list[float]) -> RowsPerRequest:
    """Return what two sample requests reveal about a handler, by the method of `ee-archive`."""
    def given(*samples: list[float]) -> list[tuple[Tensor, ...]]:
        calls: list[tuple[Tensor, ...]] = []
        with model.log.watched(calls.append):
            handler.handle([call.inputs for call in calls_of(list(samples))], None)
        return calls

    return rows_per_request(given(a), given(b), given(a, b), given(b, a))


def test_what_two_samples_miss_the_worker_finds_in_the_batch_that_shows_it(
        model: EarlyExitModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The handler sorts by length, and both sample requests have the same length."""
    handler, host = SortingByLength(model), MemoryHost()
    assert found_by_samples(model, handler, *requests(2)) == RowsPerRequest(1)
    worker = worker_of(model, handler, ServingConfig(records=str(tmp_path), keep_requests=True), host)
    calls = calls_of(requests(4, lengths=(8, 7, 6, 5)))  # sorting moves every request
    for _ in range(3):
        batch = replied(worker, calls)
        assert told(batch) == [(None, None)] * 4
        assert [reply.body for reply in batch] == [reply.body for reply in alone(model, handler, calls)]
    worker.close()
    assert {hashed for records in recorded(tmp_path) for hashed in records.request.tolist()} == {ANONYMOUS}
    assert caplog.text.count("In batches of several requests from now on") == 1
    assert host.metrics["rows_unknown"].values == {("check",): 1}


def test_a_handler_that_empties_its_requests_is_checked_like_others(model: EarlyExitModel) -> None:
    class Emptying(SortingByLength):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            return super().handle([{"rows": item.pop("rows")} for item in data], context)

    host = MemoryHost()
    replied(worker_of(model, Emptying(model), host=host), calls_of(requests(4, lengths=(8, 7, 6, 5))))
    assert host.metrics["rows_unknown"].values == {("check",): 1}


def test_before_a_batch_that_shows_it_is_drawn_rows_are_claimed_in_the_order_of_the_requests(
        model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong claims until then are the price of checking only one batch in 1,000; the first contradiction ends them."""
    drawn = iter([0.0, 0.9, 0.9, 0.1])
    monkeypatch.setattr(Random, "random", lambda self: next(drawn))
    worker = worker_of(model, SortingByLength(model))
    in_order, reversed_ = (calls_of(requests(4, lengths=lengths)) for lengths in ((5, 6, 7, 8), (8, 7, 6, 5)))
    expected = told(alone(model, AtOnce(model), in_order))
    assert told(replied(worker, in_order)) == expected, "drawn, and there is nothing wrong with it"
    wrong = told(alone(model, AtOnce(model), reversed_))[::-1]
    assert [told(replied(worker, reversed_)) for _ in range(2)] == [wrong, wrong], "not drawn"
    assert told(replied(worker, reversed_)) == [(None, None)] * 4, "drawn"
    assert told(replied(worker, in_order)) == [(None, None)] * 4, "for good"


def test_the_first_batch_of_several_is_checked_and_then_fewer_down_to_one_in_a_thousand(
        model: EarlyExitModel) -> None:
    check = worker_of(model, AtOnce(model))._answers._check  # type: ignore[union-attr]
    calls = calls_of(requests(2))
    assert not any(check.draw(calls[:1]) for _ in range(3)), "who is alone has only rows of its own"
    assert check.draw(calls) is not None
    n_drawn = sum(check.draw(calls) is not None for _ in range(5000))
    assert n_drawn < 60, "about 11 are expected"


class Grouping(AtOnce):
    """A handler that puts requests of raw bytes behind those of JSON, and its answers back in order."""

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        order = sorted(range(len(data)), key=lambda item: isinstance(data[item]["body"], bytes))
        rows = [data[item]["body"] for item in order]
        found = self.classes(torch.stack([torch.frombuffer(bytearray(one), dtype=torch.float32)
                                          if isinstance(one, bytes) else torch.tensor(one) for one in rows])).tolist()
        return [found[order.index(item)] for item in range(len(data))]


def test_a_handler_that_groups_its_requests_by_kind_is_found_out_by_the_first_mixed_batch(
        model: EarlyExitModel) -> None:
    serving, rows = worker_of(model, Grouping(model)), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def headers(as_bytes: tuple[bool, ...], batch: int) -> list[bool]:
        calls = [Call(f"{batch}-{item}", {"body": row.numpy().tobytes() if raw else row.tolist()})
                 for item, (row, raw) in enumerate(zip(rows, as_bytes))]
        return [reply is not None and EXIT_HEADER in reply.headers for reply in serving.step(calls)]

    assert all(all(headers((raw,) * 4, batch)) for batch in range(200) for raw in (True, False))
    for batch, mixed in enumerate([(True, False, False, False), (False, True, False, True)], start=200):
        assert not any(headers(mixed, batch))


def test_kinds_that_clients_make_up_are_checked_no_more_often_than_others(
        model: EarlyExitModel) -> None:
    check = worker_of(model, AtOnce(model))._answers._check  # type: ignore[union-attr]
    calls = [[Call("a", {"body": 1}, {"body": {"content-type": f"made/up-{number}"}}), Call("b", {"body": 2})]
             for number in range(2000)]
    assert sum(check.draw(batch) is not None for batch in calls) < 50 + 40


def test_where_a_batch_has_another_number_of_rows_only_that_batch_is_unknown(
        model: EarlyExitModel, checking_every_batch: None) -> None:
    handler, host = FilteringDuplicates(model), MemoryHost()
    worker = worker_of(model, handler, host=host)
    distinct, [twice, other] = calls_of(requests(3)), requests(2, seed=1)
    expected = told(alone(model, handler, distinct))
    assert told(replied(worker, distinct)) == expected
    assert told(replied(worker, calls_of([twice, other, twice]))) == [(None, None)] * 3
    assert told(replied(worker, distinct)) == expected
    assert host.metrics["rows_unknown"].values == {("count",): 1}


class Noting(AtOnce):
    """A handler that notes its calls in its attributes, in its context, in the log and in a metric."""

    context: Any

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.n_calls, self.sizes, self.by_size = 0, list[int](), dict[int, int]()

    def initialize(self, context: Any) -> None:
        self.context = context

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        self.n_calls += 1
        self.sizes.append(len(data))
        self.by_size[len(data)] = self.by_size.get(len(data), 0) + 1
        context.metrics.add_counter("Requests", len(data))
        self.context.set_response_header(0, "X-Size", str(len(data)))
        logging.getLogger("noting").warning("%d requests", len(data))
        return super().handle([{"rows": item.pop("rows")} for item in data], context)


def test_a_check_leaves_no_trace(
        model: EarlyExitModel, checking_every_batch: None, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    counted, checked = list[int](), list[Call]()
    host, handler = MemoryHost(), Noting(model)
    host.context.metrics = type("Metrics", (), {"add_counter": lambda self, name, count: counted.append(count)})()
    def counting(call: Call, *others: Any) -> Any:
        checked.append(call)
        return rows_alone(call, *others)

    monkeypatch.setattr("early_exit.handler.serving.ownership.rows_alone", counting)
    worker = worker_of(model, handler, host=host)
    handler.initialize(worker._answers._context)
    for _ in range(3):
        replies = replied(worker, calls_of(requests(4)))
        assert [reply.headers.get("X-Size") for reply in replies] == ["4", None, None, None]
        assert EXIT_HEADER in replies[0].headers
    assert len(checked) == 3
    assert (handler.n_calls, handler.sizes, handler.by_size, counted) == (3, [4, 4, 4], {4: 3}, [4, 4, 4])
    assert caplog.messages == ["4 requests"] * 3
    assert host.value("shadow_samples_total") == 12
    assert not [one for one in gc.get_objects() if type(one) is DrawnRequest], "what a check keeps is let go"


def test_a_check_leaves_no_lock_behind(model: EarlyExitModel, checking_every_batch: None) -> None:
    class GivingBackInTheEnd(AtOnce):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            assert lock.acquire(timeout=1)
            answers = super().handle(data, context)
            lock.release()
            return answers

    handler, lock = GivingBackInTheEnd(model), threading.Lock()
    handler.lock = lock  # type: ignore[attr-defined]
    worker = worker_of(model, handler)
    for _ in range(2):
        assert all(EXIT_HEADER in reply.headers for reply in replied(worker, calls_of(requests(3))))


class CatchingAll(AtOnce):
    """A handler that retries after any exception."""

    def classes(self, rows: Tensor) -> Tensor:
        while True:
            try:
                return super().classes(rows)
            except:  # noqa: E722 - some handlers do this
                continue


class FailingAlone(AtOnce):
    def handle(self, data: list[Any], context: Any) -> list[Any]:
        if len(data) == 1:
            raise RuntimeError("needs two")
        return super().handle(data, context)


@pytest.mark.parametrize("kind", [CatchingAll, FailingAlone])
def test_a_check_fails_no_answer(kind: type[AtOnce], model: EarlyExitModel, checking_every_batch: None) -> None:
    host = MemoryHost()
    worker, calls = worker_of(model, kind(model), host=host), calls_of(requests(3))
    expected = alone(model, AtOnce(model), calls)
    for _ in range(2):
        batch = replied(worker, calls)
        assert [reply.body for reply in batch] == [reply.body for reply in expected]
        assert told(batch) == told(expected)
    assert host.value("shadow_samples_total") == 6 and not host.metrics["rows_unknown"].values


def test_a_request_that_cannot_be_copied_is_answered(model: EarlyExitModel, checking_every_batch: None) -> None:
    deep: list[Any] = []
    for _ in range(600):
        deep = [deep]
    calls = [Call(call.id, {**call.inputs, "deep": deep}) for call in calls_of(requests(3))]
    assert all(EXIT_HEADER in reply.headers for reply in replied(worker_of(model, AtOnce(model)), calls))


def test_a_reply_that_cannot_be_copied_is_sent(model: EarlyExitModel, checking_every_batch: None) -> None:
    class Echoing(AtOnce):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            super().handle(data, context)
            return [item.get("deep", "flat") for item in data]

    deep: list[Any] = []
    for _ in range(600):
        deep = [deep]
    first, *others = calls_of(requests(3))
    calls = [Call(first.id, {**first.inputs, "deep": deep}), *others]
    replies = replied(worker_of(model, Echoing(model)), calls)
    assert [reply.body for reply in replies] == [deep, "flat", "flat"]
    assert all(EXIT_HEADER in reply.headers for reply in replies)
