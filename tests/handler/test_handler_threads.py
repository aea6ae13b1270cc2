"""Handlers that call the model in their own threads: all requests are answered, records name a request only where it
is known, and nothing of a batch stays in memory."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import EXIT_HEADER
from early_exit.handler.recording.format import ANONYMOUS, list_shards, read_shard, request_hash
from early_exit.handler.serving import ownership
from tests.support.host import MemoryHost, worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, alone, backbone_of_rows, calls_of, replied, requests, row, told


@pytest.fixture
def model() -> EarlyExitModel:
    backbone = backbone_of_rows()
    return build_model(backbone, *random_exits(backbone), sampling_rate=1.0, record_layers=8)


class InOneThread(AtOnce):
    """A handler that calls the model once for the whole batch, in a thread of a pool."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.pool = ThreadPoolExecutor(1)

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return self.pool.submit(super().handle, data, context).result()


class InAnEventLoop(AtOnce):
    """A handler that awaits the model, which runs in a thread of the event loop."""

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        return asyncio.run(asyncio.to_thread(super().handle, data, context))


class InSeveralThreads(AtOnce):
    """A handler that calls the model for each request in a thread of a pool."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.pool = ThreadPoolExecutor(3)

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        barrier = threading.Barrier(len(data))

        def one(item: Any) -> int:
            barrier.wait()  # so that each request has a thread of its own
            return self.classes(row(item)[None])[0].item()

        return list(self.pool.map(one, data))


class InMicroBatches(AtOnce):
    """A handler that puts parts of its batch into a queue, which two threads of the handler's lifetime process."""

    made: ClassVar[list[InMicroBatches]] = []

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.waiting: queue.Queue[Any] = queue.Queue()
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(2)]
        for thread in self.threads:
            thread.start()
        self.made.append(self)

    def close(self) -> None:
        for _ in self.threads:
            self.waiting.put(None)
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        while (given := self.waiting.get()) is not None:
            rows, number, done = given
            try:
                done.put((number, self.classes(rows).tolist()))
            except Exception as error:
                done.put((number, error))

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        done: queue.Queue[Any] = queue.Queue()
        parts = [data[start:start + 2] for start in range(0, len(data), 2)]
        for number, part in enumerate(parts):
            self.waiting.put((torch.stack([row(item) for item in part]), number, done))
        answered = dict(done.get(timeout=60) for _ in parts)
        failed = [error for error in answered.values() if isinstance(error, Exception)]
        if failed:
            raise failed[0]
        return [answer for number in range(len(parts)) for answer in answered[number]]


@pytest.fixture(autouse=True)
def ended_threads() -> Iterator[None]:
    """End the threads of the handlers, because the check of rows in later tests would take them for its handler's."""
    yield
    while InMicroBatches.made:
        InMicroBatches.made.pop().close()


KINDS = [InOneThread, InAnEventLoop, InSeveralThreads, InMicroBatches]
IN_ORDER = [InOneThread, InAnEventLoop]


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_with_threads_is_answered_and_nobody_gets_a_header_of_another(
        kind: type[AtOnce], model: EarlyExitModel) -> None:
    handler, calls = kind(model), calls_of(requests(12))
    worker = worker_of(model, handler, host=MemoryHost())
    for first in range(0, 12, 3):
        found, expected = replied(worker, calls[first:first + 3]), alone(model, AtOnce(model), calls[first:first + 3])
        assert [reply.body for reply in found] == [reply.body for reply in expected]
        if kind in IN_ORDER:
            assert told(found) == told(expected)
        else:
            assert not any(EXIT_HEADER in reply.headers for reply in found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_threads_compute_is_recorded_and_only_with_a_request_where_that_is_known(
        kind: type[AtOnce], model: EarlyExitModel, tmp_path: Path) -> None:
    host = MemoryHost()
    worker = worker_of(model, kind(model), ServingConfig(records=str(tmp_path)), host)
    calls = calls_of(requests(6))
    worker.step(calls[:3])
    worker.step(calls[3:])
    worker.close()
    found = [number for path in list_shards(tmp_path) for number in read_shard(path, []).request.tolist()]
    assert len(found) == 6
    if kind in IN_ORDER:
        assert found == [request_hash(call.id) for call in calls]
    else:
        assert found == [ANONYMOUS] * 6 and host.value("rows_unknown", "threads") == 1


def test_a_thread_that_reorders_its_batch_is_found_out_like_the_handler_itself(
        model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sorting(InOneThread):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            order = sorted(range(len(data)), key=lambda item: data[item]["rows"][0])
            answers = super().handle([data[item] for item in order], context)
            return [answers[order.index(item)] for item in range(len(data))]

    monkeypatch.setattr(ownership, "_ONE_IN", 1)
    host = MemoryHost()
    worker = worker_of(model, Sorting(model), host=host)
    for _ in range(5):
        last = replied(worker, calls_of(requests(6)))
    assert host.value("rows_unknown", "check") == 1 and not any(EXIT_HEADER in reply.headers for reply in last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_request_has_the_rows_that_threads_make_of_it(kind: type[AtOnce], model: EarlyExitModel) -> None:
    [call] = calls_of(requests(1))
    assert told(replied(worker_of(model, kind(model)), [call])) == told(alone(model, AtOnce(model), [call]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_model_in_a_thread_is_no_clients_fault(
        kind: type[AtOnce], model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a bug of the model")

    monkeypatch.setattr("early_exit.handler.inference.at_once.run_with_exits", broken)
    worker = worker_of(model, kind(model))
    assert [reply and reply.status for reply in worker.step(calls_of(requests(1)))] == [500]
    monkeypatch.undo()
    assert [reply and reply.status for reply in worker.step(calls_of(requests(3)))] == [200] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_batch_stays_behind(kind: type[AtOnce], model: EarlyExitModel) -> None:
    worker = worker_of(model, kind(model))
    for _ in range(20):
        worker.step(calls_of(requests(3)))
    assert not model.log.take() and not model.log.take_elsewhere() and not model.log.is_computing


def test_what_a_thread_computes_between_batches_belongs_to_no_batch(model: EarlyExitModel, tmp_path: Path) -> None:
    handler = AtOnce(model)

    def elsewhere() -> None:
        thread = threading.Thread(target=handler.classes, args=(torch.zeros(5, 8),))
        thread.start()
        thread.join()

    worker = worker_of(model, handler, ServingConfig(records=str(tmp_path)))
    elsewhere()
    found = replied(worker, calls_of(requests(2)))
    elsewhere()
    worker.close()
    assert all(EXIT_HEADER in reply.headers for reply in found)
    [records] = [read_shard(path, []) for path in list_shards(tmp_path)]
    assert len(records.request) == 2
