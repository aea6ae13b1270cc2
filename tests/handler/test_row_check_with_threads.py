"""The check of whose the rows are, for handlers that have threads of their own."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.serving import ownership
from early_exit.handler.user_handler.alone import rows_alone
from tests.support.host import MemoryHost, worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, alone, backbone_of_rows, calls_of, replied, requests, row, told


@pytest.fixture
def model() -> EarlyExitModel:
    backbone = backbone_of_rows()
    return build_model(backbone, *random_exits(backbone))


@pytest.fixture
def checking_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_ONE_IN", 1)


class InMicroBatches(AtOnce):
    """A handler that puts rows into one of its attributes, from which its own thread takes them."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.waiting, self.has_some = deque[tuple[Tensor, Future[int]]](), threading.Condition()
        self.ended = False
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        while not self.ended:
            with self.has_some:
                self.has_some.wait_for(lambda: self.waiting or self.ended)
                taken = [*self.waiting]
                self.waiting.clear()
            if taken:
                for (_, future), answer in zip(taken, self.classes(torch.stack([x for x, _ in taken])).tolist()):
                    future.set_result(answer)

    def close(self) -> None:
        with self.has_some:
            self.ended = True
            self.has_some.notify()
        self.thread.join()

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        futures = [Future[int]() for _ in data]
        with self.has_some:
            self.waiting.extend((row(item), future) for item, future in zip(data, futures))
            self.has_some.notify()
        return [future.result(timeout=20) for future in futures]


def test_a_check_reaches_the_threads_that_a_handler_works_with(
        model: EarlyExitModel, checking_every_batch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[Any]()
    monkeypatch.setattr("early_exit.handler.serving.ownership.rows_alone",
                        lambda *given: found.append(rows_alone(*given)) or found[-1])
    with closing(InMicroBatches(model)) as handler:
        replied(worker_of(model, handler), calls_of(requests(3)))
    assert [rows is not None for rows in found] == [True], "a copy of the handler waits for what no thread sees"


class Billing(AtOnce):
    """A handler that leaves notes of its answers for a thread, which takes them while the next requests are handled."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.notes, self.billed, self.sizes = deque[int](), list[int](), list[int]()
        self.turn, self.taken = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False
        self.thread = threading.Thread(target=self.bill, daemon=True)
        self.thread.start()

    def bill(self) -> None:
        while self.turn.acquire() and not self.ended:
            while self.notes:
                self.billed.append(self.notes.popleft())
            self.taken.release()

    def close(self) -> None:
        self.ended = True
        self.turn.release()
        self.thread.join()

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        self.sizes.append(len(data))
        self.turn.release()
        assert self.taken.acquire(timeout=20)
        answers = super().handle(data, context)
        self.notes.extend(range(len(self.billed), len(self.billed) + len(data)))
        return answers


def test_what_a_thread_of_the_handler_does_during_a_check_stays_and_there_is_no_other_check(
        model: EarlyExitModel, checking_every_batch: None, caplog: pytest.LogCaptureFixture) -> None:
    host, calls = MemoryHost(), calls_of(requests(3))
    expected = [reply.body for reply in alone(model, AtOnce(model), calls)]
    with closing(Billing(model)) as handler:
        worker = worker_of(model, handler, host=host)
        for _ in range(3):
            batch = replied(worker, calls)
            assert [reply.body for reply in batch] == expected
            assert told(batch) == [(None, None)] * 3, "nothing tells any more whose the rows are"
    assert handler.billed == [*range(6)], "each note is taken once"
    assert handler.sizes == [3, 1, 3, 3], "one check, and what it has changed cannot be told from what the thread has"
    assert host.metrics["rows_unknown"].values == {("check",): 1}
    assert caplog.text.count("perhaps in a thread of the handler") == 1


@pytest.fixture
def event_loop() -> Iterator[None]:
    """Start an event loop in a thread; its tasks may call the handler."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("thread", ["timer", "event_loop"])
def test_a_timer_and_an_event_loop_count_as_threads_of_the_handler(
        thread: str, model: EarlyExitModel, checking_every_batch: None, request: pytest.FixtureRequest) -> None:
    class Sizing(AtOnce):
        sizes: ClassVar[list[int]] = []

        def handle(self, data: list[Any], context: Any) -> list[Any]:
            self.sizes.append(len(data))
            return super().handle(data, context)

    request.getfixturevalue(thread)
    worker = worker_of(model, Sizing(model))
    for _ in range(3):
        replied(worker, calls_of(requests(4)))
    assert Sizing.sizes == [4, 1, 4, 4]
