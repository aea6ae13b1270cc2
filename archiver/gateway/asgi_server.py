"""The process that serves the gateway."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from early_exit.archiver.gateway.messages import Limits
from early_exit.archiver.gateway.upstream import PREDICTION_S

_PING_S = 20.0
_GRACE_S = 10


class GatewayServer(uvicorn.Server):
    """A server that says when it can be reached."""

    def __init__(self, config: uvicorn.Config, when_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_started = when_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            self._when_started()


def make_server(app: Starlette, host: str, port: int, limits: Limits,
                when_started: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """Return a server that pings its clients and takes no larger messages than the limits allow.

    Args:
        app: the application that it serves.
        host: address to listen on.
        port: port to listen on.
        limits: limits of the messages.
        when_started: called once, when clients can connect.
    """
    # While a message waits for its turn nothing is read, not even a pong: who is silent for longer than that has gone.
    longest_s = PREDICTION_S * (1 + limits.items_per_message / limits.in_flight)
    return GatewayServer(uvicorn.Config(
        app, host, port, log_level="warning", ws_ping_interval=_PING_S, ws_ping_timeout=longest_s,
        ws_max_size=limits.bytes_per_message, ws_per_message_deflate=False,  # images are compressed already
        timeout_graceful_shutdown=_GRACE_S), when_started)
