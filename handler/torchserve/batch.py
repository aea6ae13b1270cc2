"""A batch of TorchServe as calls, and replies as TorchServe takes them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from early_exit.handler.call import Call, Reply

_ENVELOPES = "ts.torch_handler.request_envelope.base"
_NEAR = 8
"""Frames between an envelope and what it calls."""
_NODE = "__"
"""Between a workflow's name and a node's in the name under which TorchServe serves the node."""


def is_in_envelope() -> bool:
    """Tell whether an envelope calls this code.

    With `service_envelope`, TorchServe puts an envelope around what it calls of an archive, which gets instances
    instead of requests, and is not told so.
    """
    envelope: type | None = getattr(sys.modules.get(_ENVELOPES), "BaseEnvelope", None)
    frame = inspect.currentframe()
    for _ in range(_NEAR):
        if frame is None or envelope is None:
            break
        if isinstance(frame.f_locals.get("self"), envelope):
            return True
        frame = frame.f_back
    return False


def calls_of(data: Sequence[Any], context: Any, *, in_envelope: bool = False) -> list[Call]:
    """Return the calls of a batch, one for each request.

    Args:
        data: what TorchServe hands to `handle()`: one dict of named parts a request, or what an envelope made of them.
        context: TorchServe's, which knows ids and headers of the requests.
        in_envelope: whether an envelope calls `handle()`.
    """
    calls = []
    for item in sorted(context.request_ids):
        headers = context.get_all_request_header(item)
        instances = (tuple(data) if not item else ()) if in_envelope else None
        calls.append(Call(context.get_request_id(item), None if in_envelope else data[item], headers, instances,
                          hears_status=_hears_status(headers, context.model_name)))
    return calls


def answer(replies: Sequence[Reply | None], context: Any, *, in_envelope: bool = False) -> list[Any]:
    """Set status and headers of the replies, and return what `handle()` returns.

    Args:
        replies: to the requests of the batch, in order; None where a request is not answered yet.
        context: TorchServe's.
        in_envelope: whether an envelope calls `handle()`.
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
    return responses[0] if in_envelope else responses  # the first has what is returned for all


def _hears_status(headers: Mapping[str, Any], model: str) -> bool:
    """Tell whether a status of its own reaches a request's client: calls over gRPC have no HTTP headers, and a workflow
    takes what its nodes return for a success, whatever the status."""
    return _NODE not in model and any(
        name.lower() == "host" and isinstance(value, str) for name, value in headers.items())
