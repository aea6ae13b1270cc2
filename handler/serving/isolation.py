"""One bad item must not fail its batch: answer what can be answered, and say of the rest what is wrong."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch

from early_exit.handler.errors import InputError
from early_exit.handler.model import EarlyExitModel, ServedBatch
from early_exit.handler.serving.anytime import who_asks
from early_exit.handler.user_handler.wrapper import UserHandler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What a call of the user's handler gave for some items of a batch."""

    items: tuple[int, ...]
    responses: list[Any]
    batches: list[ServedBatch]
    """The calls of the model that were made."""
    refused: bool = False
    """Whether the response is an error of ours."""


def answer_items(data: list[Any], context: Any, inner: UserHandler, model: EarlyExitModel) -> list[Served]:
    """Return the responses to all items: together when that works, else one by one.

    TorchServe fails the whole batch when a handler raises. Here an item that makes the handler raise gets
    an error response of its own: 400 when it failed before the model took it, 500 after.
    """
    items = tuple(range(len(data)))
    try:
        return [_call(items, data, context, inner, model)]
    except Exception as error:
        if len(data) == 1:
            return [_refuse(0, error, context, model)]
    served: list[Served] = []
    for item in items:
        alone = context_of([item], context)
        try:
            one = _call((item,), [data[item]], alone, inner, model)
        except Exception as error:
            one = _refuse(item, error, context, model)
        served.append(one)
    return served


def _call(items: tuple[int, ...], data: list[Any], context: Any, inner: UserHandler, model: EarlyExitModel) -> Served:
    # Calls of an attempt that failed were never answered, so they are forgotten, not recorded.
    model.start_call(who_asks(context, len(data)))
    responses = inner.handle(data, context)
    if not isinstance(responses, list) or len(responses) != len(data):
        found = f"{len(responses)} responses" if isinstance(responses, list) else type(responses).__name__
        raise RuntimeError(f"{type(inner).__name__} returned {found} for {len(data)} requests")
    return Served(items, responses, model.take_served())


def _refuse(item: int, error: Exception, context: Any, model: EarlyExitModel) -> Served:
    """Set an item's error status and return its JSON body."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # By its type, never by its text, which may be a client's.
    if isinstance(error, torch.AcceleratorError) or (out_of_memory and model.is_computing):
        raise error  # TorchServe answers these with 507 and knows what to do with the worker
    reached_model = bool(model.take_served()) or model.is_computing or out_of_memory
    code = getattr(error, "error_code", None)  # ts.utils.util.PredictionException carries its own
    if not isinstance(code, int):
        code = 500 if reached_model and not isinstance(error, InputError) else 400
    kind = "BadRequestException" if code < 500 else "InternalServerException"
    log = logger.info if code < 500 else logger.error
    log("request %s answered %d", context.get_request_id(item), code, exc_info=error)
    context.set_response_status(code, kind, item)
    context.set_response_content_type(item, "application/json")
    body = {"code": code, "type": kind, "message": f"{type(error).__name__}: {error}"}
    return Served((item,), [body], [], refused=True)


def context_of(items: list[int], context: Any) -> Any:
    """Return the context as the handler would see it if only these items were in the batch."""
    part = copy.copy(context)
    part.request_ids = {number: context.get_request_id(item) for number, item in enumerate(items)}
    part.request_processor = [context.request_processor[item] for item in items]
    return part
