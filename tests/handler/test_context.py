"""The context that a user's handler gets behaves like TorchServe's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from ts.context import Context, RequestProcessor

from early_exit.handler.call import Call
from early_exit.handler.user_handler.context import HandlerContext, RequestState, ToolContext

HEADERS = [{"accept": "text/plain", "ts_request_sequence_id": "7"}, {}]
CONFIG = {"minWorkers": 1, "handler": {"top": 5}, "pt2": {"compile": {"enable": True}}, "early_exit": {"exits": False}}


def theirs() -> Any:
    context = Context("digits", "/models/digits", {"model": {"modelVersion": "1.0"}}, 8, None, "0.12.0",
                      model_yaml_config=CONFIG)
    context.request_ids = {0: "id-0", 1: "id-1"}
    context.request_processor = [RequestProcessor(dict(headers)) for headers in HEADERS]
    return context


def ours(base: Any = None) -> HandlerContext:
    context = HandlerContext(base or ToolContext("digits", "/models/digits", batch_size=8),
                             {"model": {"modelVersion": "1.0"}}, CONFIG)
    context.begin([Call(f"id-{number}", {}, headers) for number, headers in enumerate(HEADERS)])
    return context


USES: dict[str, Callable[[Any], object]] = {
    "ids": lambda context: [context.get_request_id(number) for number in (0, 1, 2)] + [context.get_request_id()],
    "ids by position": lambda context: context.request_ids,
    "a header": lambda context: [context.get_request_header(number, "accept") for number in (0, 1)],
    "all headers": lambda context: context.get_all_request_header(0),
    "sequence": lambda context: [context.get_sequence_id(number) for number in (0, 1)],
    "a status": lambda context: (context.set_response_status(418, "Teapot", 1), context.get_response_status(1)),
    "status of the first": lambda context: (context.set_response_status(code=400), context.get_response_status(0)),
    "all statuses": lambda context: (context.set_all_response_status(503, "Busy"),
                                     [context.get_response_status(number) for number in (0, 1)]),
    "a status that nobody set": lambda context: context.get_response_status(0)[0],
    "response headers": lambda context: (context.set_response_header(1, "X-Own", "yes"),
                                         [context.get_response_headers(number) for number in (0, 1)]),
    "content type": lambda context: (context.set_response_content_type(0, "image/png"),
                                     [context.get_response_content_type(number) for number in (0, 1)]),
    "processors": lambda context: (context.request_processor[0].get_request_properties(),
                                   context.request_processor[0].add_response_property("X-Own", "yes"),
                                   context.request_processor[0].get_response_header("X-Own"),
                                   context.request_processor[0].get_response_headers()),
    "model": lambda context: (context.model_name, context.manifest, context.stopping_criteria),
    "system": lambda context: context.system_properties,
}


@pytest.mark.parametrize("use", USES)
def test_a_handler_reads_and_sets_in_it_what_it_would_in_torchserves(use: str) -> None:
    expected = USES[use](theirs())
    assert USES[use](ours()) == expected, "over the context of a tool"
    assert USES[use](ours(theirs())) == expected, "over TorchServe's own"


@pytest.mark.parametrize(("real", "imitation"), [(Context, HandlerContext), (RequestProcessor, RequestState)])
def test_every_method_of_torchserves_is_there_with_its_parameters(real: type[Any], imitation: type[Any]) -> None:
    for name, method in inspect.getmembers(real, inspect.isfunction):
        if not name.startswith("_"):
            expected = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(imitation, name)).parameters) == expected, name


def test_what_repackaging_added_to_the_configuration_is_hidden() -> None:
    assert ours().model_yaml_config == {"minWorkers": 1, "handler": {"top": 5}}


def test_what_is_set_of_one_call_is_not_told_of_the_next() -> None:
    context = ours()
    context.set_all_response_status(418, "Teapot")
    context.set_response_header(0, "X-Own", "yes")
    before = context.reply(0, "body")
    context.begin([Call("id-2", {})])
    after = context.reply(0, "body")
    assert (before.status, before.phrase, before.headers) == (418, "Teapot", {"X-Own": "yes"})
    assert (after.status, after.phrase, after.headers) == (200, "", {})
    assert before.headers == {"X-Own": "yes"}


def test_what_a_handler_sets_is_seen_by_its_host_but_not_by_calls_beside_it() -> None:
    base = theirs()
    context = ours(base)
    context.loaded = "vocabulary"
    assert base.loaded == context.view().loaded == copy.copy(context).loaded == "vocabulary"
    first, second = context.view(), context.view()
    first.noted = "first"
    second.noted = "second"
    assert first.noted == "first" and not hasattr(base, "noted")
