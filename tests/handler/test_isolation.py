"""One bad item: the others are answered, and the status tells whose fault it was. With TorchServe's own context."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.model import EarlyExitModel
from early_exit.handler.serving.isolation import answer_items
from early_exit.training.data.preprocessing import worker_context


class Numbers:
    """A handler whose requests are lists of four numbers."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        for item in data:
            if item["body"] == "vast":
                raise MemoryError("Unable to allocate 1 PiB")
            if item["body"] == "CUDA":
                CODES[item["body"]]
        batch = torch.stack([torch.tensor(item["body"]) for item in data])
        classes = self.model(batch).argmax(1).tolist()
        return [1 // (0 if item["body"][0] == 99.0 else 1) and number for item, number in zip(data, classes)]


@pytest.fixture(scope="module")
def model() -> EarlyExitModel:
    return EarlyExitModel(Backbone.from_module(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (4,)))


def context_for(count: int) -> Any:
    from ts.context import RequestProcessor

    context = worker_context(Path(), {"model": {"modelName": "numbers", "handler": "none"}})
    context.request_ids = {item: f"id-{item}" for item in range(count)}
    context.request_processor = [RequestProcessor({"item": str(item)}) for item in range(count)]
    return context


CODES = {"CPU": 1}
GOOD = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("bad", "status", "message"), [
    ("text", 400, "TypeError"),                    # fails before the model
    ("CUDA", 400, "KeyError: 'CUDA'"),             # the client's text, not the device's
    ("vast", 500, "Unable to allocate"),           # its memory, not the worker's
    ([1.0, 2.0], 400, r"expected float32 input of shape \(4,\)"),  # does not fit the model
    ([99.0, 0.0, 0.0, 0.0], 500, "ZeroDivisionError"),             # fails after the model
])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_item_gets_its_own_status_and_the_others_their_answers(
        model: EarlyExitModel, bad: object, status: int, message: str, position: int) -> None:
    bodies: list[object] = [GOOD, GOOD, GOOD]
    bodies[position] = bad
    context = context_for(3)
    served = answer_items([{"body": body} for body in bodies], context, Numbers(model), model)
    responses = {item: response for one in served for item, response in zip(one.items, one.responses)}
    for item in range(3):
        code, _ = context.get_response_status(item)
        assert code == (status if item == position else 200)
    assert responses[position]["code"] == status
    assert re.search(message, responses[position]["message"])
    assert all(isinstance(responses[item], int) for item in range(3) if item != position)
    assert sum(len(one.batches) for one in served) == 2, "an attempt that failed is not recorded"


def test_an_error_inside_the_model_is_a_500(model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("early_exit.handler.inference.executor.run_with_exits", broken)
    context = context_for(1)
    answer_items([{"body": GOOD}], context, Numbers(model), model)
    assert context.get_response_status(0)[0] == 500


def test_out_of_memory_is_left_to_torchserve(model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("early_exit.handler.inference.executor.run_with_exits", broken)
    with pytest.raises(MemoryError):
        answer_items([{"body": GOOD}], context_for(1), Numbers(model), model)


def test_a_handler_that_loses_a_response_fails_loudly(model: EarlyExitModel) -> None:
    class Forgetful(Numbers):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            return super().handle(data, context)[:-1]

    context = context_for(2)
    answer_items([{"body": GOOD}, {"body": GOOD}], context, Forgetful(model), model)
    assert [context.get_response_status(item)[0] for item in range(2)] == [500, 500]


def test_an_explanation_follows_the_gradient_through_the_whole_backbone(model: EarlyExitModel) -> None:
    batch = torch.randn(2, 4, requires_grad=True)
    model(batch).sum().backward()
    assert batch.grad is not None and batch.grad.abs().sum() > 0
    assert model.take_served() == []
