"""Isolation of bad items: a bad request gets an error reply, and every other request of the batch is answered."""

from __future__ import annotations

import logging
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from early_exit.handler.call import Call, Reply, own_copy, share_instances
from early_exit.handler.detection.detections import with_nulls
from early_exit.handler.errors import InputError
from early_exit.handler.model.call_log import ServedBatch
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.protocol import ANYTIME_HEADER, FULL
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.entry_point import UserHandler

logger = logging.getLogger(__name__)


_CLIENTS = (ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
"""Exceptions that show an error in the request if they are raised before the model is called. Such errors are a text
that is not JSON, a list instead of an object, a missing key, and bytes that end too early. Other exceptions show an
error in the handler."""
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""The memory address of an object, which Python writes into many messages."""


@dataclass(frozen=True)
class Served:
    """The result of one call of the user's handler, for some calls of a batch."""

    positions: tuple[int, ...]
    """The positions of the calls in the batch."""
    calls: Sequence[Call]
    replies: list[Reply]
    """One for each call, in order."""
    batches: list[ServedBatch]
    """The calls of the model that the handler made."""
    owners: Sequence[Sequence[int]] | None = None
    """For each call of the model, and for each row of its input: the position in `calls` of the request that the row
    belongs to. None if there are no rows, or if it is not known to which requests they belong."""
    rows_per_item: int | None = None
    """The number of rows that each item of the requests became, side by side in the order of the items; None if that is
    not known."""
    error: Exception | None = None
    """The exception of the handler, if the reply is an error reply of this worker."""

    @property
    def refused(self) -> bool:
        """Whether the reply is an error reply of this worker."""
        return self.error is not None


def answer_calls(calls: Sequence[Call], handler: UserHandler, context: HandlerContext, model: EarlyExitModel,
                 rows_per_request: int | None = 1, *, alone: bool = True) -> list[Served]:
    """Answer all calls together or, if that fails, one by one.

    Without this function, an exception of a handler fails all requests that the handler was given. Here, only the call
    that makes the handler raise gets an error reply: 400 if the request cannot be read, 500 if the handler or the model
    failed. If clients cannot receive a status of their own, the whole batch fails.

    Args:
        calls: the calls of the batch.
        handler: the user's handler.
        context: the handler's context.
        model: the model that the handler calls.
        rows_per_request: the number of rows of the model's input that the handler makes from each of several requests,
            in the order of the requests; None if that is not known.
        alone: whether no other call of the handler is in progress.

    Raises:
        MemoryError, torch.AcceleratorError: this worker is out of memory, or its device has failed.
        Exception: the handler raised it, and the client of the call cannot receive a status of its own.
    """
    in_one = share_instances(calls)  # if so, it is not known which instance belongs to which request
    try:
        return [_call(tuple(range(len(calls))), calls, handler, context, model, rows_per_request, alone)]
    except Exception as error:
        if in_one or not any(call.hears_status for call in calls):
            raise
        if len(calls) == 1:
            return [_refuse(0, calls[0], error, model)]
    served: list[Served] = []
    for position, call in enumerate(calls):
        try:
            one = _call((position,), [call], handler, context, model, rows_per_request, alone)
        except Exception as error:
            if not call.hears_status:
                raise
            one = _refuse(position, call, error, model)
        served.append(one)
    return served


def _call(positions: tuple[int, ...], calls: Sequence[Call], handler: UserHandler, context: HandlerContext,
          model: EarlyExitModel, rows_per_request: int | None, alone: bool) -> Served:
    # The model's calls in a failed attempt led to no answers, so they are forgotten and not recorded.
    model.log.begin([call.has_header(ANYTIME_HEADER) for call in calls], rows_per_request, alone=alone)
    context.begin(calls)
    # Copies, so that a handler's changes to a request reach neither a second attempt nor the records.
    items = [own_copy(item) for call in calls for item in call.items]
    results = handler.handle(items, context)
    if calls[0].instances is None and (not isinstance(results, list) or len(results) != len(items)):
        returned = f"{len(results)} responses" if isinstance(results, list) else type(results).__name__
        raise RuntimeError(f"{type(handler).__name__} returned {returned} for {len(items)} requests")
    # In an envelope, one call has all items, and the envelope itself checks the result for these items.
    bodies = [results[number] if call.instances is None else results if call.instances else []
              for number, call in enumerate(calls)]
    # Copies, so that a handler that keeps its results may write into them again before these replies are sent: for
    # another request of the batch, for another call whose early answer is ready, or for a check.
    replies = [context.reply(number, own_copy(body)) for number, body in enumerate(bodies)]
    here, elsewhere = model.log.take(), model.log.take_elsewhere()
    batches = [*here, *elsewhere]
    owners = None
    # Threads of the handler end in any order, so the order of their calls does not show whose rows they have.
    if not elsewhere or (alone and 1 in (len(batches), len(calls))):
        n_rows = [len(batch.answers.outputs) for batch in batches]
        owners = _owners(n_rows, calls, rows_per_request, are_its_own=not elsewhere)
    if model.assembly.description.detector is not None:
        for number, reply in enumerate(replies):
            if _left_early(number, batches, owners):  # what is not a number in a full answer is the handler's own
                reply.body = with_nulls(reply.body)
    n_items = len(items) * (rows_per_request or 0)
    is_known = owners is not None and sum(len(batch.answers.outputs) for batch in batches) == n_items
    return Served(positions, calls, replies, batches, owners, rows_per_request if is_known else None)


def _left_early(number: int, batches: Sequence[ServedBatch], owners: Sequence[Sequence[int]] | None) -> bool:
    """Tell whether a row of a request left early, or may have done so: the owners of the rows are not known, or the
    handler has kept its answer."""
    stages = [batch.answers.stages.tolist() for batch in batches]
    owners = owners or [[number] * len(of_batch) for of_batch in stages]
    own = [stage for of_batch, of_rows in zip(stages, owners)
           for stage, owner in zip(of_batch, of_rows) if owner == number]
    return not own or any(stage != FULL for stage in own)


def _owners(n_rows: Sequence[int], calls: Sequence[Call], rows_per_request: int | None, *, are_its_own: bool
            ) -> list[list[int]] | None:
    """Return the owners of the rows of each call of the model, given the numbers of rows; see `Served.owners`."""
    n_calls = len(calls)
    if not sum(n_rows) or share_instances(calls):
        return None
    if n_calls == 1 and are_its_own:  # whatever the handler does, the rows can belong to no other request
        return [[0] * n for n in n_rows]
    if rows_per_request is None or sum(n_rows) != rows_per_request * sum(len(call.items) for call in calls):
        return None
    owners = [number for number, call in enumerate(calls) for _ in range(rows_per_request * len(call.items))]
    return [owners[end - n:end] for n, end in zip(n_rows, accumulate(n_rows))]


def _refuse(position: int, call: Call, error: Exception, model: EarlyExitModel) -> Served:
    """Return the error reply to a call."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # Only the type decides, because a client may have written parts of the text.
    if isinstance(error, torch.AcceleratorError) or (out_of_memory and model.log.is_computing):
        raise error  # the host knows what to do with a worker in this state
    reached_model = bool([*model.log.take(), *model.log.take_elsewhere()]) or model.log.is_computing
    status, kind = _status_of(error, reached_model)
    # TorchServe's PredictionException has the text for the client in `message`.
    message = getattr(error, "message", None) if hasattr(error, "error_code") else None
    message = message if isinstance(message, str) else f"{type(error).__name__}: {_ADDRESS.sub('', str(error))}"
    log = logger.info if status < 500 else logger.error
    log("request %s was answered with status %d", call.id, status, exc_info=error)
    body = call.body([{"code": status, "type": kind, "message": message}])
    return Served((position,), [call], [Reply(body, status, kind, {"content-type": "application/json"})], [],
                  error=error)


def _status_of(error: Exception, reached_model: bool) -> tuple[int, str]:
    """Return the status for an exception, and TorchServe's name for such an error."""
    status = getattr(error, "error_code", None)
    if type(status) is int and 400 <= status < 600:  # other libraries use `error_code` for other numbers
        return status, "InternalServerException"  # TorchServe uses this name whatever the status
    # Pillow raises an OSError without `errno` for bytes that are not an image; errors of the system have an `errno`.
    is_clients = (isinstance(error, _CLIENTS) or (isinstance(error, OSError) and error.errno is None)
                  or _is_of_too_many_pixels(error))
    if isinstance(error, InputError) or (is_clients and not reached_model):
        return 400, "BadRequestException"
    return 500, "InternalServerException"


def _is_of_too_many_pixels(error: Exception) -> bool:
    """Tell whether the error is Pillow's refusal to open an image with too many pixels, if the handler uses Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(error, pillow.DecompressionBombError)
