"""Concurrent calls of one handler: each sees only the attributes that it has set, and all share the same handler."""

from __future__ import annotations

import contextvars
import decimal
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch

from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.user_handler.description import Root
from early_exit.handler.user_handler.entry_point import UserHandler, load_entry_point
from tests.support.host import MemoryHost, worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, backbone_of_rows, requests, row


@pytest.fixture
def model() -> EarlyExitModel:
    backbone = backbone_of_rows()
    return build_model(backbone, *random_exits(backbone), answers="early")


def answered(model: EarlyExitModel, handler: UserHandler, bodies: list[list[float]]) -> list[Any]:
    """Return the answers to requests that arrive one per step."""
    worker = worker_of(model, handler, ServingConfig(answers="early"), MemoryHost())
    handler.initialize(worker._answers._context)  # type: ignore[union-attr]
    waiting: dict[str, Call] = {}
    answers: dict[str, Any] = {}
    for number in range(len(bodies) + 100):
        if number < len(bodies):
            waiting[f"id-{number}"] = Call(f"id-{number}", {"rows": bodies[number]})
        for call, reply in zip([*waiting.values()], worker.step([*waiting.values()])):
            if reply is not None:
                assert reply.status == 200, reply.body
                answers[call.id] = reply.body
                del waiting[call.id]
    assert not waiting
    return [answers[f"id-{number}"] for number in range(len(bodies))]


class KnownElsewhere(AtOnce):
    """A handler that stores one of its bound methods, keeps its context, and sets attributes on that context."""

    def initialize(self, context: Any) -> None:
        self.context = context
        self.before_the_model = self.remember

    def remember(self, item: Any) -> None:
        self.remembered = item["rows"]

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        self.context.number = mine = getattr(self.context, "number", 0) + 1
        self.before_the_model(data[0])
        super().handle(data, context)
        return [{"remembered": self.remembered, "id": self.context.get_request_id(0), "same": context is self.context,
                 "number": self.context.number == mine}]


def test_what_a_call_sets_through_a_method_that_others_know_or_on_a_kept_context_is_its_own(
        model: EarlyExitModel) -> None:
    handler, bodies = KnownElsewhere(model), requests(20)
    for number, answer in enumerate(answered(model, handler, bodies)):
        assert answer == {"remembered": bodies[number], "id": f"id-{number}", "same": True, "number": True}
    assert handler.context.number > 1, "what a call has put there is there for those that begin after it"


FUNCTION = """
import torch
from helper import Helper

class Service:
    def preprocess(self, data):
        self.data = data
        return torch.tensor([item["rows"] for item in data])

service, helpers, last = Service(), {"one": Helper()}, None

def handle(data, context):
    global last
    helpers["one"].rows = last = data[0]["rows"]
    with torch.no_grad():
        model(service.preprocess(data))
    return [[service.data[0]["rows"], last, helpers["one"].rows]]
"""


def test_what_a_function_sets_in_global_names_and_on_objects_that_these_reach_is_its_own(
        model: EarlyExitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_function.py").write_text(FUNCTION)
    (tmp_path / "helper.py").write_text("class Helper: ...")
    monkeypatch.syspath_prepend(tmp_path)
    handler, roots = load_entry_point("their_function.py")
    roots[Root.MODULE].model = model  # type: ignore[attr-defined]
    handler.initialize = lambda context: None  # type: ignore[method-assign]
    bodies = requests(20)
    assert answered(model, handler, bodies) == [[body] * 3 for body in bodies]


class InAContext(AtOnce):
    """A handler that keeps settings and something of a request in context variables."""

    def initialize(self, context: Any) -> None:
        setting.set("of initialize()")
        self.decimals = decimal.getcontext().copy()
        self.decimals.prec = 3
        decimal.setcontext(self.decimals)

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        before = last.get([])
        last.set(data[0]["rows"])
        super().handle(data, context)
        return [(setting.get(), str(decimal.Decimal(1) / 3), last.get(), before)]


setting: ContextVar[str] = ContextVar("setting", default="none")
last: ContextVar[list[float]] = ContextVar("last")


def test_context_variables_are_as_in_one_thread(model: EarlyExitModel) -> None:
    bodies = requests(12)

    def check() -> None:
        answers = answered(model, InAContext(model), bodies)
        assert [answer[:3] for answer in answers] == [("of initialize()", "0.333", body) for body in bodies]
        assert all(answer[3] in [[], *bodies[:number]] for number, answer in enumerate(answers))
        assert sum(answer[3] != [] for answer in answers) > 1, "calls see what calls have set that ended before"

    contextvars.copy_context().run(check)


def test_what_one_call_deletes_is_gone_for_it_alone_until_it_has_ended(model: EarlyExitModel) -> None:
    class Deleting(AtOnce):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            context.mine = data[0]["rows"]
            with torch.no_grad():
                answers = self.model(torch.stack([row(item) for item in data])).argmax(dim=1).tolist()
            assert context.mine == data[0]["rows"]
            del context.mine
            return answers

    assert len(answered(model, Deleting(model), requests(8))) == 8
