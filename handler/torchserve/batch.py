"""Converts a batch of TorchServe to calls, and replies to TorchServe's responses."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from early_exit.handler.call import Call, Reply

_ENVELOPES = "ts.torch_handler.request_envelope.base"
_NEAR = 8
"""The largest number of stack frames between an envelope and the code that it calls."""
_OF_HTTP = frozenset(("host", "content-length", "content-type", "transfer-encoding", "authorization", "user-agent",
                      "accept", "accept-encoding", "connection"))
"""Headers of which each request over HTTP has some: one with a body has its length or its encoding."""
_NODE = "__"
"""The separator between the names of a workflow and of its node, in the name under which TorchServe serves the node."""


def is_in_envelope() -> bool:
    """Tell whether an envelope calls this code.

    With `service_envelope`, TorchServe puts an envelope around the entry point of an archive. The entry point then gets
    instances instead of requests, but is not told so.
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
        data: the first argument of `handle()`: one dict of named parts per request, or the instances of an envelope.
        context: TorchServe's context, which has the ids and headers of the requests.
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
    """Set status and headers of the replies, and return the result of `handle()`.

    Args:
        replies: the replies to the requests of the batch, in order; None for a request that is not answered yet.
        context: TorchServe's context.
        in_envelope: whether an envelope calls `handle()`.
    """
    responses: list[Any] = []
    for item, reply in enumerate(replies):
        if reply is None:
            del context.request_ids[item]  # TorchServe answers only the requests that are in it
            responses.append(None)
            continue
        context.set_response_status(reply.status, reply.phrase, item)
        for name, value in reply.headers.items():
            context.set_response_header(item, name, value)
        responses.append(reply.body)
    return responses[0] if in_envelope else responses  # the first one has the results for all instances


def _hears_status(headers: Mapping[str, Any], model: str) -> bool:
    """Tell whether a request's client can receive a status for this request alone.

    A client that calls over gRPC cannot: its calls have no HTTP headers. A client of a workflow cannot either: the
    workflow treats every response of its nodes as a success, whatever the status. TorchServe also accepts requests of
    HTTP/1.0, and others without the header Host.
    """
    return _NODE not in model and any(
        name.lower() in _OF_HTTP and isinstance(value, str) for name, value in headers.items())
