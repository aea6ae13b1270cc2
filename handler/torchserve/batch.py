"""A batch of TorchServe as calls, and replies as TorchServe takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from early_exit.handler.call import Call, Reply


def calls_of(data: Sequence[Any], context: Any) -> list[Call]:
    """Return the calls of a batch.

    Args:
        data: what TorchServe hands to `handle()`: one dict of named parts a request.
        context: TorchServe's, which knows ids and headers of the requests.
    """
    return [Call(context.get_request_id(item), inputs, context.get_all_request_header(item))
            for item, inputs in enumerate(data)]


def answer(replies: Sequence[Reply | None], context: Any) -> list[Any]:
    """Set status and headers of the replies, and return what `handle()` returns.

    Args:
        replies: to the requests of the batch, in order; None where a request is not answered yet.
        context: TorchServe's.
    """
    responses: list[Any] = []
    for item, reply in enumerate(replies):
        if reply is None:
            del context.request_ids[item]  # TorchServe answers those that are in there
            responses.append(None)
            continue
        context.set_response_status(reply.status, reply.phrase, item)
        for name, value in reply.headers.items():
            context.set_response_header(item, name, value)
        responses.append(reply.body)
    return responses
