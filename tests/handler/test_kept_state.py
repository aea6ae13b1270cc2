"""A check of the rows leaves what a handler keeps, wherever it keeps it, as it was."""

from __future__ import annotations

import itertools
import queue
import random
from array import array
from collections import UserDict
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.serving import ownership
from early_exit.handler.user_handler.entry_point import FunctionHandler
from tests.support.host import worker_of
from tests.support.row_handlers import AtOnce, backbone_of_rows, calls_of, replied, requests, told


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> EarlyExitModel:
    """Return a model whose worker checks every batch."""
    monkeypatch.setattr(ownership, "_ONE_IN", 1)
    return build_model(backbone_of_rows())


class Counts:
    n = 0


class Remembering(AtOnce):
    """A handler that keeps something of each batch in every kind of place."""

    of_class: ClassVar[list[int]] = []
    n_in_class = 0

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.history: dict[str, list[int]] = {"sizes": []}
        self.counts, self.space, self.pair = Counts(), SimpleNamespace(n=0), ([0], {"n": 0})
        self.total, self.array, self.bytes = torch.zeros(2), array("d", [0.0]), bytearray(1)
        self.results: list[dict[str, Any]] = [{} for _ in range(9)]

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        global n_in_module
        for result, item in zip(self.results, data):
            result["rows"] = item["rows"]
        self.history["sizes"].append(len(data))
        self.history.setdefault("more", []).append(len(data))
        self.of_class.append(len(data))
        type(self).n_in_class += 1
        n_in_module += 1
        self.counts.n += 1
        self.space.n += 1
        self.pair[0][0] += 1
        self.pair[1]["n"] += 1
        self.total += 1
        self.array[0] += 1
        self.bytes[0] += 1
        for result, answer in zip(self.results, super().handle(data, context)):
            result["answer"] = answer
        return self.results[:len(data)]

    def kept(self) -> list[Any]:
        return [self.history, self.of_class, self.n_in_class, n_in_module, self.counts.n, self.space.n, self.pair,
                self.total.tolist(), list(self.array), list(self.bytes)]


n_in_module = 0


def test_what_a_handler_keeps_at_any_depth_is_after_a_check_as_before_it(
        model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs before the replies leave, so it must not write into results that a handler uses again."""
    monkeypatch.setattr(Remembering, "of_class", [])
    monkeypatch.setattr(Remembering, "n_in_class", 0)
    monkeypatch.setitem(globals(), "n_in_module", 0)
    handler = Remembering(model)
    worker = worker_of(model, handler)
    for number in range(3):
        calls = calls_of(requests(4, seed=number))
        sent = [call.inputs["rows"] for call in calls]
        replies = replied(worker, calls)
        assert [reply.body["rows"] for reply in replies] == sent
    assert handler.kept() == [{"sizes": [4] * 3, "more": [4] * 3}, [4] * 3, 3, 3, 3, 3, ([3], {"n": 3}),
                              [3.0, 3.0], [3.0], [3]]


def test_global_names_of_a_handler_that_is_a_function_are_after_a_check_as_before_it(model: EarlyExitModel) -> None:
    module = ModuleType("theirs")
    exec("n, seen = 0, {}\ndef handle(data, context):\n    global n\n    n += 1\n    for item in data:\n"
         "        seen[len(seen)] = n\n    return inner.handle(data, context)", vars(module))
    vars(module)["inner"] = AtOnce(model)
    worker = worker_of(model, FunctionHandler(module, "handle"))
    for number in range(3):
        replied(worker, calls_of(requests(2, seed=number)))
    assert vars(module)["n"] == 3 and vars(module)["seen"] == {0: 1, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3}


class Drawing(AtOnce):
    """A handler that answers with random numbers of every generator, so that each request has numbers of its own."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.random, self.torch, self.numpy = random.Random(0), torch.Generator(), np.random.default_rng(0)
        self.old = np.random.RandomState(0)
        self.torch.manual_seed(0)

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        numbers = [(self.random.random(), self.torch.get_state().sum() + torch.rand((), generator=self.torch).item(),
                    self.numpy.random(), self.old.rand(), random.random(), torch.rand(()).item(), np.random.rand())
                   for _ in data]
        super().handle(data, context)
        return numbers


class Lending(AtOnce):
    """A handler with a pool of one thing, which a call that ends at the model does not give back, and a step that
    counts in the handler itself."""

    n = 0

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.pool: queue.Queue[str] = queue.Queue()
        self.pool.put("one")
        self.settings = UserDict(n=0)
        self.steps = [self.count]

    def count(self) -> None:
        self.n += 1
        self.settings["n"] += 1

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        lent = self.pool.get_nowait()
        for step in self.steps:
            step()
        super().handle(data, context)
        self.pool.put(lent)
        return [(self.n, self.settings["n"])] * len(data)


class Numbering(AtOnce):
    """A handler that numbers its requests by an iterator."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model)
        self.numbers = itertools.count()

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        numbers = [next(self.numbers) for _ in data]
        super().handle(data, context)
        return numbers


@pytest.mark.parametrize("kind", [Drawing, Lending, Numbering])
def test_answers_after_a_check_are_those_without_it(
        kind: type[AtOnce], model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[Any]:
        for seeded in (random.seed, torch.manual_seed, np.random.seed):
            seeded(0)
        worker = worker_of(model, kind(model))
        return [reply.body for _ in range(3) for reply in replied(worker, calls_of(requests(2)))]

    checked = answers()
    monkeypatch.setattr(ownership.RowCheck, "draw", lambda self, calls: None)
    assert checked == answers()


def test_what_moves_on_whenever_it_is_used_ends_the_checks(
        model: EarlyExitModel, caplog: pytest.LogCaptureFixture) -> None:
    worker = worker_of(model, Numbering(model))
    assert told(replied(worker, calls_of(requests(2)))) == [(None, None)] * 2
    assert "keeps an object of itertools.count" in caplog.text
