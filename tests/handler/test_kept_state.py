"""A check of the rows leaves what a handler keeps, wherever it keeps it, as it was."""

from __future__ import annotations

from array import array
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.serving import ownership
from early_exit.handler.user_handler.entry_point import FunctionHandler
from tests.support.host import worker_of
from tests.support.row_handlers import AtOnce, backbone_of_rows, calls_of, replied, requests


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
