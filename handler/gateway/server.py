"""The process that serves the gateway."""

from __future__ import annotations

import uvicorn
from starlette.applications import Starlette

from early_exit.handler.gateway.messages import Limits
from early_exit.handler.gateway.upstream import PREDICTION_S

_PING_S = 20.0
_GRACE_S = 10


def make_server(app: Starlette, host: str, port: int, limits: Limits) -> uvicorn.Server:
    """Return a server that pings its clients and takes no larger messages than the limits allow."""
    # While a message waits for its turn nothing is read, not even a pong: who is silent for longer than that has gone.
    longest_s = PREDICTION_S * (1 + limits.items_per_message / limits.in_flight)
    return uvicorn.Server(uvicorn.Config(
        app, host, port, log_level="warning", ws_ping_interval=_PING_S, ws_ping_timeout=longest_s,
        ws_max_size=limits.bytes_per_message, ws_per_message_deflate=False,  # images are compressed already
        timeout_graceful_shutdown=_GRACE_S))
