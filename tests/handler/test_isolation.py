"""One bad item: the others are answered, and its status tells whether the client or the server is at fault."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from ts.utils.util import PredictionException

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.call import Call, Reply
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.serving.isolation import Served, answer_calls
from early_exit.handler.user_handler.context import HandlerContext
from tests.support.host import MemoryHost, worker_of
from tests.support.torchserve_context import OVER_HTTP, predict, service_of

LARGE = b"P6 100000 100000 255\n"
"""The beginning of an image file with ten billion pixels."""


class Numbers:
    """A handler whose requests are lists of four numbers; other bodies provoke errors."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model

    def initialize(self, context: Any) -> None: ...

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        for item in data:
            if item["body"] == "vast":
                raise MemoryError("Unable to allocate 1 PiB")
            if item["body"] == "CUDA":
                CODES[item["body"]]
            if item["body"] == "picture":
                Image.open(io.BytesIO(b"no picture"))
            if item["body"] == "large picture":
                Image.open(io.BytesIO(LARGE)).load()
            if item["body"] == "file":
                Path("no such file").read_text()
            if item["body"] == "attribute":
                print(item["body"].no_such_attribute)
            if isinstance(item["body"], Exception):
                raise item["body"]
        batch = torch.stack([torch.tensor(item["body"]) for item in data])
        classes = self.model(batch).argmax(1).tolist()
        return [1 // (0 if item["body"][0] == 99.0 else 1) and number for item, number in zip(data, classes)]


@pytest.fixture(scope="module")
def model() -> EarlyExitModel:
    return build_model(Backbone.from_module(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), (4,)))


def answered(model: EarlyExitModel, bodies: list[object], handler: Numbers | None = None) -> list[Served]:
    context = HandlerContext(MemoryHost().context, {}, {})
    calls = [Call(f"id-{number}", {"body": body}) for number, body in enumerate(bodies)]
    return answer_calls(calls, handler or Numbers(model), context, model)


def replies_of(served: list[Served]) -> dict[int, Reply]:
    return {position: reply for part in served for position, reply in zip(part.positions, part.replies)}


CODES = {"CPU": 1}
GOOD = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("bad", "status", "message"), [
    ("text", 400, "TypeError"),                    # the handler fails before it calls the model
    ("CUDA", 400, "KeyError: 'CUDA'"),             # the text comes from the client, not from the device
    ("picture", 400, "UnidentifiedImageError"),
    ("large picture", 400, "DecompressionBombError"),
    ("file", 500, "FileNotFoundError"),
    ("attribute", 500, "AttributeError"),          # the handler is at fault
    (RuntimeError("not ready"), 500, "not ready"),
    ("vast", 500, "Unable to allocate"),           # only this item needs too much memory; the worker does not
    ([1.0, 2.0], 400, r"expected float32 input of shape \(4,\)"),  # the input does not fit the model
    ([99.0, 0.0, 0.0, 0.0], 500, "ZeroDivisionError"),             # the handler fails after it has called the model
])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_item_gets_its_own_status_and_the_others_their_answers(
        model: EarlyExitModel, bad: object, status: int, message: str, position: int) -> None:
    bodies: list[object] = [GOOD, GOOD, GOOD]
    bodies[position] = bad
    served = answered(model, bodies)
    replies = replies_of(served)
    assert [replies[item].status for item in range(3)] == [status if item == position else 200 for item in range(3)]
    assert replies[position].body["code"] == status
    assert re.search(message, replies[position].body["message"])
    assert all(isinstance(replies[item].body, int) for item in range(3) if item != position)
    assert sum(len(part.batches) for part in served) == 2, "an attempt that failed is not recorded"


def test_what_a_handler_takes_out_of_a_request_is_there_when_it_is_asked_alone(model: EarlyExitModel) -> None:
    class Taking(Numbers):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            return super().handle([{"body": item.pop("body")} for item in data], context)

    assert [replies_of(answered(model, [GOOD, "CUDA", GOOD], Taking(model)))[item].status
            for item in range(3)] == [200, 400, 200]


def test_what_a_handler_changes_deep_in_a_request_is_as_it_was_when_it_is_asked_alone(model: EarlyExitModel) -> None:
    class Scaling(Numbers):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            for item in data:
                item["body"]["numbers"][:] = [number / 255 for number in item["body"].pop("scaled")]
            seen.append([item["body"]["numbers"] for item in data])
            return super().handle([{"body": item["body"]["numbers"]} for item in data], context)

    seen: list[Any] = []
    bodies: list[object] = [{"numbers": [], "scaled": GOOD}, {"numbers": []}, {"numbers": [], "scaled": GOOD}]
    replies = replies_of(answered(model, bodies, Scaling(model)))
    assert [replies[item].status for item in range(3)] == [200, 400, 200]
    assert seen == [[[number / 255 for number in GOOD]]] * 2


def test_an_error_tells_nothing_of_memory(model: EarlyExitModel) -> None:
    bad = ValueError(f"cannot read {io.BytesIO()!r} and {object()!r}")
    assert " at 0x" in str(bad)
    [part] = answered(model, [bad])
    assert part.replies[0].body["message"] == "ValueError: cannot read <_io.BytesIO object> and <object object>"


def test_an_exception_of_torchserve_keeps_its_status_and_its_text(model: EarlyExitModel) -> None:
    """The habit `own_exception` checks the same against TorchServe 0.12."""
    [part] = answered(model, [PredictionException("the image is too dark", 422)])
    assert part.replies[0].body == {"code": 422, "type": "InternalServerException", "message": "the image is too dark"}


@pytest.mark.parametrize("code", [200, 1045, -3, True])
def test_a_number_that_is_no_status_of_an_error_is_none(model: EarlyExitModel, code: int) -> None:
    error = type("DatabaseError", (Exception,), {"error_code": code})("cannot connect")
    [part] = answered(model, [error])
    assert part.replies[0].status == part.replies[0].body["code"] == 500


def test_a_part_that_a_call_over_grpc_names_like_a_header_of_http_does_not_make_it_one(model: EarlyExitModel) -> None:
    service = service_of(worker_of(model, Numbers(model)))
    with pytest.raises(KeyError):
        predict(service.handle, [{"body": "CUDA", "host": b""}], headers=[{"host": {"content-type": "text/plain"}}])


def test_a_bad_request_over_http_without_the_header_host_fails_no_other(model: EarlyExitModel) -> None:
    """TorchServe accepts HTTP/1.0, and HTTP/1.1 without this header."""
    service = service_of(worker_of(model, Numbers(model)))
    answers, context = predict(service.handle, [{"body": "CUDA"}, {"body": GOOD}],
                               headers=[{"Content-Length": "4"}, OVER_HTTP])
    assert [context.get_response_status(item)[0] for item in range(2)] == [400, 200], answers


@pytest.mark.parametrize("hears", [(False, False), (True, False)])
def test_where_a_status_does_not_reach_the_client_a_bad_item_fails_its_batch_as_before(
        model: EarlyExitModel, hears: tuple[bool, bool]) -> None:
    context, bodies = HandlerContext(MemoryHost().context, {}, {}), [GOOD, "CUDA"]
    calls = [Call(f"id-{number}", {"body": body}, hears_status=hears[number]) for number, body in enumerate(bodies)]
    with pytest.raises(KeyError):
        answer_calls(calls, Numbers(model), context, model)


def test_who_hears_of_its_own_status_does_not_fail_those_who_would_not(model: EarlyExitModel) -> None:
    context = HandlerContext(MemoryHost().context, {}, {})
    calls = [Call("heard", {"body": "CUDA"}), Call("unheard", {"body": GOOD}, hears_status=False)]
    replies = replies_of(answer_calls(calls, Numbers(model), context, model))
    assert [replies[0].status, replies[1].status] == [400, 200]


def test_an_error_inside_the_model_is_a_500(model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("early_exit.handler.inference.at_once.run_with_exits", broken)
    assert replies_of(answered(model, [GOOD]))[0].status == 500


def test_out_of_memory_is_left_to_the_host(model: EarlyExitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("early_exit.handler.inference.at_once.run_with_exits", broken)
    with pytest.raises(MemoryError):
        answered(model, [GOOD])


def test_a_handler_that_loses_a_response_fails_loudly(model: EarlyExitModel) -> None:
    class Forgetful(Numbers):
        def handle(self, data: list[Any], context: Any) -> list[Any]:
            return super().handle(data, context)[:-1]

    replies = replies_of(answered(model, [GOOD, GOOD], Forgetful(model)))
    assert [replies[item].status for item in range(2)] == [500, 500]


def test_an_explanation_follows_the_gradient_through_the_whole_backbone(model: EarlyExitModel) -> None:
    batch = torch.randn(2, 4, requires_grad=True)
    model(batch).sum().backward()
    assert batch.grad is not None and batch.grad.abs().sum() > 0
    assert model.log.take() == []
