"""Concurrent calls of one handler: each has its own contents of the lists, dicts and sets that the handler keeps."""

from __future__ import annotations

import time
from argparse import Namespace
from collections import UserDict, UserList, deque
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.user_handler.attributes import HandlerAttributes
from early_exit.handler.user_handler.context import HandlerContext, ToolContext
from tests.handler.test_handler_attributes import answered
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, backbone_of_rows, requests


@pytest.fixture
def model() -> EarlyExitModel:
    backbone = backbone_of_rows()
    return build_model(backbone, *random_exits(backbone), answers="early")


class Keeping(AtOnce):
    """A handler that puts facts of its request into every kind of container, and reads them after the model."""

    of_class: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.about: dict[str, Any] = {}
        self.refilled: list[Any] = []
        self.replaced, self.deep = [None], ({"of": {"request": [None]}},)
        self.line: deque[Any] = deque()
        self.names: set[str] = set()
        self.space = SimpleNamespace(rows=[])
        self.options, self.user_dict, self.user_list = Namespace(), UserDict[str, Any](), UserList[Any]()

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        rows = data[0]["rows"]
        self.about["rows"] = self.of_class["rows"] = rows
        self.refilled.clear()
        self.refilled.extend(rows)
        self.replaced[0] = self.deep[0]["of"]["request"][0] = rows
        self.line.append(rows)
        self.names.clear()
        self.names.add(str(rows))
        self.space.rows[:] = [rows]
        self.options.rows = self.user_dict["rows"] = rows
        self.user_list[:] = [rows]
        if rows[0] > 0:
            self.about["positive"] = True
        super().handle(data, context)
        return [[self.about.pop("rows"), self.of_class["rows"], [*self.refilled], self.replaced[0],
                 self.deep[0]["of"]["request"][0], self.line.popleft(), [*self.names], self.space.rows[0],
                 self.options.rows, self.user_dict["rows"], self.user_list[0], self.about.pop("positive", False)]]


def test_what_a_call_puts_into_a_container_at_any_depth_is_its_own_while_others_run(model: EarlyExitModel) -> None:
    bodies = requests(20)
    assert answered(model, Keeping(model), bodies) == [
        [body, body, body, body, body, body, [str(body)], body, body, body, body, body[0] > 0] for body in bodies]


def test_what_calls_have_added_to_containers_is_there_for_calls_that_begin_after_their_end(
        model: EarlyExitModel) -> None:
    class Remembering(AtOnce):
        def __init__(self, model: EarlyExitModel) -> None:
            super().__init__(model)
            self.known: dict[str, Any] = {}
            self.log: list[Any] = []
            self.seen: set[str] = set()

        def initialize(self, context: Any) -> None: ...

        def handle(self, data: list[Any], context: Any) -> list[Any]:
            key = str(data[0]["rows"])
            if key not in self.known:
                self.log.append(key)
                self.seen.add(key)
                [self.known[key]] = super().handle(data, context)
            return [self.known[key]]

    handler, bodies = Remembering(model), requests(9)
    first, second = answered(model, handler, bodies), answered(model, handler, bodies)
    assert first == second
    assert sorted(handler.log) == sorted(handler.known) == sorted(handler.seen) == sorted(map(str, bodies))


def test_two_calls_never_take_the_same_item_from_a_stock(model: EarlyExitModel) -> None:
    class Buffers(AtOnce):
        def __init__(self, model: EarlyExitModel) -> None:
            super().__init__(model)
            self.free = [[number] for number in range(30)]

        def initialize(self, context: Any) -> None: ...

        def handle(self, data: list[Any], context: Any) -> list[Any]:
            buffer = self.free.pop()
            buffer[:] = data[0]["rows"]
            super().handle(data, context)
            rows = [*buffer]
            self.free.append(buffer)
            return [rows]

    handler, bodies = Buffers(model), requests(20)
    assert answered(model, handler, bodies) == bodies
    assert len({id(buffer) for buffer in handler.free}) == len(handler.free) == 30


def test_what_a_thread_takes_from_a_queue_does_not_come_back(model: EarlyExitModel) -> None:
    class Queueing(AtOnce):
        def __init__(self, model: EarlyExitModel) -> None:
            super().__init__(model)
            self.queue: deque[Any] = deque()
            self.handled: list[Any] = []

        def initialize(self, context: Any) -> None: ...

        def empty(self) -> None:
            """Do what a thread of the handler does at any time."""
            while self.queue:
                handled.append(self.queue.popleft())

        def handle(self, data: list[Any], context: Any) -> list[Any]:
            self.empty()
            self.queue.append(data[0]["rows"])
            answers = super().handle(data, context)
            self.empty()
            return answers

    handled: list[Any] = []
    bodies = requests(20)
    answered(model, Queueing(model), bodies)
    assert sorted(handled) == sorted(bodies)


def test_what_a_thread_takes_from_a_queue_while_a_call_waits_is_not_in_it_afterwards() -> None:
    handler: Any = AtOnce(torch.nn.Identity())  # type: ignore[arg-type]
    handler.queue = deque(["earlier"])
    attributes = HandlerAttributes(handler, HandlerContext(ToolContext("m", "."), {}, {}))
    with attributes.call():
        handler.queue.append("own")
        with attributes.waiting():
            assert handler.queue.popleft() == "earlier"
        assert [*handler.queue] == ["own"]
    assert [*handler.queue] == ["own"]


@pytest.mark.parametrize("labels", [{str(number): f"label {number}" for number in range(1000)},
                                    {str(number): [f"n{number}", f"label {number}"] for number in range(1000)}],
                         ids=["names", "lists of names"])
def test_a_switch_stays_cheap_for_a_handler_with_a_thousand_labels(labels: dict[str, Any]) -> None:
    handler: Any = AtOnce(torch.nn.Identity())  # type: ignore[arg-type]
    handler.mapping, handler.about = labels, {}
    attributes = HandlerAttributes(handler, HandlerContext(ToolContext("m", "."), {}, {}))

    def seconds() -> float:
        started = time.thread_time()
        with attributes.call(), attributes.waiting():
            pass
        return time.thread_time() - started

    assert min(seconds() for _ in range(20)) < 0.003
