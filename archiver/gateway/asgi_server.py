"""The server that runs the gateway, with limits on what it reads from a connection before the application sees it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from early_exit.archiver.gateway.messages import TRY_LATER, BytesInFlight, Limits, NoRoom, Share
from early_exit.archiver.gateway.upstream import PREDICTION_S

_PING_S = 20.0
_GRACE_S = 10
HEADERS_S, BODY_S = 10.0, 60.0
"""`HEADERS_S` is the time that the headers of a request may take to arrive, counted from the connection or from their
first byte. `BODY_S` is the time that its body may take after that, and the time within which a client must read an
answer that waits for it."""
_BESIDE = 64
"""The number of connections without a WebSocket that may be open: of the page, of `/ask`, and those that have sent
nothing yet."""
_FRAME_BYTES = 64
"""The bytes that a fragment of a message takes in memory beside its content."""


class GatewayServer(uvicorn.Server):
    """A server that reports when clients can connect."""

    def __init__(self, config: uvicorn.Config, when_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_started = when_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            self._when_started()


class _ReadInTime(asyncio.Protocol):
    """A connection that ends if its client does not read the data that waits for it, whether it is closing or not."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    _unread: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """Start the time within which the client must read the data that waits for it."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._read_within_s(), self.transport.abort)

    def resume_writing(self) -> None:
        """Continue, because the client has read everything."""
        super().resume_writing()
        self._end_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_unread()

    def _read_within_s(self) -> float:
        raise NotImplementedError

    def _end_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()


class _Requests(_ReadInTime, H11Protocol):
    """HTTP for a limited number of connections, with limits on the time in which a request arrives and its answer is
    read."""

    def __init__(self, *arguments: Any, most: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._most = most
        self._limited: object = None
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses while the client has data to read
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._limit_what_arrives()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._limit_what_arrives()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_limit()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over, with the limits of a WebSocket."""
        self._end_unread()
        super().handle_websocket_upgrade(event)

    def _read_within_s(self) -> float:
        return BODY_S

    def _limit_what_arrives(self) -> None:
        state = self.conn.their_state
        if state is self._limited:
            return
        self._end_limit()
        limits_s: dict[object, float] = {h11.IDLE: HEADERS_S, h11.SEND_BODY: BODY_S}
        if state in limits_s:
            self._limit = self.loop.call_later(limits_s[state], self.transport.abort)
        self._limited = state

    def _end_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()


class _Messages(_ReadInTime, WebSocketsSansIOProtocol):
    """WebSockets whose messages count among the bytes in flight from their first byte on."""

    def __init__(self, *arguments: Any, held: BytesInFlight, silent_s: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._silent_s = silent_s
        self._share = Share(held)

    def data_received(self, data: bytes) -> None:
        self._hold(len(data))
        super().data_received(data)

    def handle_cont(self, event: Frame) -> None:
        self._hold(_FRAME_BYTES)
        super().handle_cont(event)

    async def receive(self) -> Any:
        """Return the next event; from then on, the application counts its bytes."""
        event = await super().receive()
        if self.queue.empty():
            self._share.give_back()
        return event

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._share.give_back()

    def _read_within_s(self) -> float:
        return self._silent_s

    def _hold(self, n_bytes: int) -> None:
        if self.close_sent:
            return  # later data is thrown away
        try:
            self._share.take(n_bytes)
        except NoRoom as reason:
            self.conn.fail(TRY_LATER, str(reason))
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.stop_keepalive()
            self.close_sent = True
            self.frames = []
            self._share.give_back()
            self.queue.put_nowait({"type": "websocket.disconnect", "code": TRY_LATER, "reason": str(reason)})
            # If the connection were closed at once with unread bytes, it would be reset, and the client would not learn
            # the reason.
            self.loop.call_soon(self.transport.write_eof)  # after the answers to messages that came with this one
            self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)


def make_server(app: Starlette, host: str, port: int, limits: Limits, in_flight: BytesInFlight,
                when_started: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """Return a server that pings its clients and reads no more than the limits allow.

    Args:
        app: the application to serve.
        host: the address to listen on.
        port: the port to listen on.
        limits: the limits of messages.
        in_flight: counts the bytes that are read, together with those that the application holds.
        when_started: called once, when clients can connect.
    """
    # While a message waits for its turn, nothing is read, not even a pong. A client that is silent for longer has gone.
    longest_s = PREDICTION_S * (1 + limits.items_per_message / limits.in_flight)
    return GatewayServer(uvicorn.Config(
        app, host, port, log_level="warning", ws_ping_interval=_PING_S, ws_ping_timeout=longest_s,
        http=cast(type[asyncio.Protocol], partial(_Requests, most=limits.connections + _BESIDE)),
        ws=cast(type[asyncio.Protocol], partial(_Messages, held=in_flight, silent_s=longest_s)),
        ws_max_size=limits.bytes_per_message, ws_per_message_deflate=False,  # images are compressed already
        timeout_graceful_shutdown=_GRACE_S), when_started)
