"""A handler that keeps its results, and writes into them again, changes no reply that has not been sent yet.

TorchServe sends the replies of a batch before it hands over the next one, so the original of such a handler is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.serving import ownership
from tests.support.host import worker_of
from tests.support.plans import random_exits
from tests.support.row_handlers import AtOnce, backbone_of_rows, calls_of, replied, requests


class Keeping(AtOnce):
    """A handler that keeps a result for each place in a batch; a result tells the first number of its request."""

    writes_first = True
    """Whether it writes before it calls the model. A check of the worker ends there."""

    def __init__(self, model: EarlyExitModel, new: Callable[[], Any], write: Callable[[Any, float], object]) -> None:
        super().__init__(model)
        self.kept, self.write = [new() for _ in range(8)], write

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        if not self.writes_first:
            super().handle(data, context)
        for result, item in zip(self.kept, data):
            self.write(result, item["rows"][0])
        if self.writes_first:
            super().handle(data, context)
        return self.kept[:len(data)]


class InRows(Keeping):
    """The same with one tensor, whose rows are the results."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__(model, lambda: None, lambda result, number: None)
        self.kept = [*torch.zeros(8, 1)]
        self.write = torch.Tensor.fill_


def noted(result: dict[str, Any], number: float) -> None:
    result.update(number=number)


KINDS: dict[str, Callable[[EarlyExitModel], Keeping]] = {
    "dict": lambda model: Keeping(model, dict, noted),
    "list in a dict": lambda model: Keeping(model, lambda: {"numbers": [0.0]}, lambda result, number:
                                            result["numbers"].__setitem__(0, number)),
    "dict in a tuple": lambda model: Keeping(model, lambda: ({},), lambda result, number: noted(result[0], number)),
    "bytearray": lambda model: Keeping(model, bytearray, lambda result, number:
                                       result.__setitem__(slice(None), repr(number).encode())),
    "rows of a tensor": InRows,
}


def number_in(body: Any) -> float:
    """Return the number that a reply tells when it is sent."""
    if isinstance(body, (bytearray, Tensor)):
        return float(body)
    body = body[0] if isinstance(body, tuple) else body
    return float(body["numbers"][0] if "numbers" in body else body["number"])


def numbers_of(calls: Sequence[Call]) -> list[float]:
    return [pytest.approx(call.inputs["rows"][0]) for call in calls]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[[EarlyExitModel], Keeping]:
    return KINDS[request.param]


def test_a_bad_request_beside_others_does_not_change_their_replies(
        kind: Callable[[EarlyExitModel], Keeping]) -> None:
    """Then each request is handled alone, one after the other, and all replies are sent at the end."""
    model = build_model(backbone_of_rows())
    calls = calls_of(requests(4))
    calls.insert(2, Call("bad", {"rows": "no numbers", "body": b""}))
    replies = worker_of(model, kind(model)).step(calls)
    assert [reply and reply.status for reply in replies] == [200, 200, 400, 200, 200]
    assert [number_in(reply.body) for reply in replies if reply and reply.status == 200] == numbers_of(
        calls[:2] + calls[3:])


def test_a_check_that_cannot_be_undone_changes_no_reply(
        kind: Callable[[EarlyExitModel], Keeping], timer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_ONE_IN", 1)  # every batch is checked
    model = build_model(backbone_of_rows())
    for seed in range(9):  # with each of them, another request is drawn
        calls = calls_of(requests(4, seed=seed))
        replies = replied(worker_of(model, kind(model)), calls)
        assert [number_in(reply.body) for reply in replies] == numbers_of(calls)


def test_of_early_answers_that_are_ready_in_the_same_step_each_is_its_own(
        kind: Callable[[EarlyExitModel], Keeping]) -> None:
    """A tensor or bytearray that holds one request's result while another is handled makes `ee-archive` refuse."""
    backbone = backbone_of_rows()
    model = build_model(backbone, *random_exits(backbone), answers="early")
    handler = kind(model)
    handler.writes_first = isinstance(handler.kept[0], (dict, tuple))
    worker = worker_of(model, handler, ServingConfig(answers="early"))
    waiting = calls_of(requests(12))
    most = 0
    while waiting:
        replies = worker.step(waiting)
        ready = [(call, reply) for call, reply in zip(waiting, replies) if reply is not None]
        assert [number_in(reply.body) for _, reply in ready] == numbers_of([call for call, _ in ready])
        waiting, most = [call for call, reply in zip(waiting, replies) if reply is None], max(most, len(ready))
    assert most > 1, "the test needs answers that are ready in the same step"
