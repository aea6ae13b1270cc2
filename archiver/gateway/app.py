"""The gateway as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from early_exit.archiver.gateway.access import SUBPROTOCOL, Access
from early_exit.archiver.gateway.dashboard import Decisions, Live, Plans
from early_exit.archiver.gateway.messages import TRY_LATER, BytesInFlight, Limits, NoRoom, Share
from early_exit.archiver.gateway.upstream import Upstream, answer_item
from early_exit.archiver.gateway.websocket import serve_socket

PAGE = Path(__file__).with_name("page")
_HEADERS = {
    # The page loads nothing from elsewhere, and no answer of a server can make it do so.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer"}


def create_app(upstream: Upstream, *, token: str, names: Collection[str] = (), limits: Limits | None = None,
               in_flight: BytesInFlight | None = None, plans: Plans = lambda file_name: None,
               decisions: Decisions = lambda model: []) -> Starlette:
    """Return the application.

    Args:
        upstream: the server behind the gateway; it is closed with the application.
        token: the secret that clients must send.
        names: host names of the gateway, besides 'localhost' and IP addresses.
        limits: the limits for clients.
        in_flight: counts the bytes that are held; the server that reads them uses the same counter.
        plans: returns what the live page shows of an archive's plan.
        decisions: returns the decisions of a model's watcher and operator for the live page.

    Raises:
        ValueError: the token is empty.
    """
    limits, n_open = limits or Limits(), 0
    held = in_flight or BytesInFlight(limits.bytes_in_all)
    in_all, live = asyncio.Semaphore(limits.in_flight_in_all), Live(upstream, plans, decisions)

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers=_HEADERS)

    async def state(request: Request) -> Response:
        return JSONResponse(live.state(request.query_params.get("model")))

    async def answered(request: Request, share: Share) -> Response:
        """Answer one body with the answers of all exits; the response counts in the share until it is read."""
        body = bytearray()
        try:
            async for part in request.stream():
                share.take(len(part))
                body += part
                if len(body) > limits.bytes_per_item:
                    return _refusal(413, f"at most {limits.bytes_per_item} bytes")
            async with in_all:
                message = await answer_item(upstream, request.path_params["model"], bytes(body), anytime=True)
            whole = JSONResponse(message, message["status"])
            share.take(len(whole.body))
        except NoRoom as error:
            return _refusal(503, str(error))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        return StreamingResponse(_parts(whole), whole.status_code, whole.headers)

    async def socket(connection: WebSocket) -> None:
        nonlocal n_open
        await connection.accept(SUBPROTOCOL if SUBPROTOCOL in connection.scope["subprotocols"] else None)
        if n_open >= limits.connections:
            await connection.close(TRY_LATER, f"{limits.connections} clients are connected, which is the limit")
            return
        n_open += 1
        try:
            await serve_socket(connection, connection.path_params["model"], upstream, limits, in_all, held, live.seen)
        finally:
            n_open -= 1

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(live.run())
        yield
        looking.cancel()
        await upstream.close()

    return Starlette(lifespan=lifespan, middleware=[Middleware(Access, token, names)], routes=[
        Route("/", page), Route("/state", state), Route("/ask/{model}", _Ask(held, answered), methods=["POST"]),
        WebSocketRoute("/ws/{model}", socket), Mount("/page", StaticFiles(directory=PAGE))])


class _Ask:
    """Handles requests with a body; their bytes are released when the client has read the answer or has gone."""

    def __init__(self, held: BytesInFlight, answered: Callable[[Request, Share], Awaitable[Response]]) -> None:
        self._held, self._answered = held, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held.share() as share:
            response = await self._answered(Request(scope, receive), share)
            await response(scope, receive, send)


async def _parts(whole: Response) -> AsyncIterator[bytes | memoryview]:
    # The end of a response in parts is sent only when the client has read the parts before it.
    yield whole.body


def _refusal(status: int, error: str) -> Response:
    # The rest of the body is not read.
    return JSONResponse({"status": status, "error": error}, status, {"Connection": "close"})
