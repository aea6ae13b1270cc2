"""One bad item must not fail its batch: answer what can be answered, and say of the rest what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from early_exit.handler.call import Call, Reply
from early_exit.handler.errors import InputError
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import ANYTIME_HEADER
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.entry_point import UserHandler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """What one call of the user's handler gave for some calls of a batch."""

    positions: tuple[int, ...]
    """Where the calls stand in the batch."""
    calls: Sequence[Call]
    replies: list[Reply]
    """One for each call, in order."""
    batches: list[ServedBatch]
    """The calls of the model that were made."""
    owners: Sequence[Sequence[int]] | None = None
    """For each call of the model, and for each row of its input: the position in `calls` of the request that the row
    belongs to. None where there are no rows, or where it is not known whose they are."""
    refused: bool = False
    """Whether the reply is an error of ours."""


def answer_calls(calls: Sequence[Call], handler: UserHandler, context: HandlerContext, model: EarlyExitModel,
                 rows_per_request: int | None = 1) -> list[Served]:
    """Return the replies to all calls: together when that works, else one by one.

    A handler that raises fails all requests that it was given. Here a call that makes the handler raise gets an error
    reply of its own: 400 when it failed before the model took it, 500 after.

    Args:
        calls: of the batch.
        handler: the user's.
        context: the handler's.
        model: what the handler calls.
        rows_per_request: how many rows of the model's input the handler makes of each of several requests, in their
            order; None where that is not known.

    Raises:
        MemoryError, torch.AcceleratorError: this worker is out of memory, or its device has failed.
    """
    try:
        return [_call(tuple(range(len(calls))), calls, handler, context, model, rows_per_request)]
    except Exception as error:
        if len(calls) == 1:
            return [_refuse(0, calls[0], error, model)]
    served: list[Served] = []
    for position, call in enumerate(calls):
        try:
            alone = _call((position,), [call], handler, context, model, rows_per_request)
        except Exception as error:
            alone = _refuse(position, call, error, model)
        served.append(alone)
    return served


def _call(positions: tuple[int, ...], calls: Sequence[Call], handler: UserHandler, context: HandlerContext,
          model: EarlyExitModel, rows_per_request: int | None) -> Served:
    # Calls of an attempt that failed were never answered, so they are forgotten, not recorded.
    model.log.begin([call.has_header(ANYTIME_HEADER) for call in calls], rows_per_request)
    context.begin(calls)
    responses = handler.handle([call.inputs for call in calls], context)
    if not isinstance(responses, list) or len(responses) != len(calls):
        returned = f"{len(responses)} responses" if isinstance(responses, list) else type(responses).__name__
        raise RuntimeError(f"{type(handler).__name__} returned {returned} for {len(calls)} requests")
    replies = [context.reply(number, response) for number, response in enumerate(responses)]
    batches = model.log.take()
    n_rows = [len(batch.answers.outputs) for batch in batches]
    return Served(positions, calls, replies, batches, _owners(n_rows, len(calls), rows_per_request))


def _owners(n_rows: Sequence[int], n_calls: int, rows_per_request: int | None) -> list[list[int]] | None:
    """Return the owners of the rows of each call of the model, given their numbers; see `Served.owners`."""
    if not sum(n_rows):
        return None
    if n_calls == 1:  # whatever the handler does, there is nobody else whose they could be
        return [[0] * n for n in n_rows]
    if rows_per_request is None or sum(n_rows) != n_calls * rows_per_request:
        return None
    return [[row // rows_per_request for row in range(end - n, end)] for n, end in zip(n_rows, accumulate(n_rows))]


def _refuse(position: int, call: Call, error: Exception, model: EarlyExitModel) -> Served:
    """Return the error reply to a call."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # By its type, never by its text, which may be a client's.
    if isinstance(error, torch.AcceleratorError) or (out_of_memory and model.log.is_computing):
        raise error  # the host knows what to do with a worker in this state
    reached_model = bool(model.log.take()) or model.log.is_computing or out_of_memory
    status = getattr(error, "error_code", None)  # exceptions of TorchServe's handler API carry their own
    if not isinstance(status, int):
        status = 500 if reached_model and not isinstance(error, InputError) else 400
    kind = "BadRequestException" if status < 500 else "InternalServerException"
    log = logger.info if status < 500 else logger.error
    log("request %s answered %d", call.id, status, exc_info=error)
    body = {"code": status, "type": kind, "message": f"{type(error).__name__}: {error}"}
    return Served((position,), [call], [Reply(body, status, kind, {"content-type": "application/json"})], [],
                  refused=True)
