"""The gateway as an ASGI application."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from early_exit.archiver.gateway.dashboard import Decisions, Live, Plans
from early_exit.archiver.gateway.messages import NOT_ALLOWED, TRY_LATER, Limits
from early_exit.archiver.gateway.upstream import Upstream, answer_item
from early_exit.archiver.gateway.websocket import serve_socket

PAGE = Path(__file__).with_name("page")
_POLICY = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"
"""The page needs nothing from elsewhere, and nothing that a server says can make it ask for anything."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


def create_app(upstream: Upstream, *, token: str | None, limits: Limits | None = None,
               plans: Plans = lambda file_name: None, decisions: Decisions = lambda model: []) -> Starlette:
    """Return the application.

    Args:
        upstream: the server behind the gateway; it is closed with the application.
        token: secret that clients must send; none lets in whoever names this host by a loopback name.
        limits: limits of what a client may ask for.
        plans: tells the live page what an archive promises.
        decisions: tells the live page what a model's watcher decided.
    """
    limits, n_open = limits or Limits(), 0
    in_all, live = asyncio.Semaphore(limits.in_flight_in_all), Live(upstream, plans, decisions)

    def lets_in(connection: HTTPConnection) -> bool:
        origin = connection.headers.get("origin")
        if origin and urlsplit(origin).netloc != connection.headers.get("host"):
            return False  # a page of another site in the same browser
        if token is None:
            return True
        sent = connection.headers.get("authorization", "").removeprefix("Bearer ")
        return secrets.compare_digest((sent or connection.query_params.get("token", "")).encode(), token.encode())

    async def page(request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    async def state(request: Request) -> Response:
        if not lets_in(request):
            return _refusal()
        return JSONResponse(live.state(request.query_params.get("model")))

    async def ask(request: Request) -> Response:
        """Answer one body with what every exit would have said."""
        if not lets_in(request):
            return _refusal()
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limits.bytes_per_item:
                return JSONResponse({"status": 413, "error": f"at most {limits.bytes_per_item} bytes"}, 413)
        async with in_all:
            message = await answer_item(upstream, request.path_params["model"], bytes(body), anytime=True)
        return JSONResponse(message, message["status"])

    async def socket(connection: WebSocket) -> None:
        nonlocal n_open
        await connection.accept()  # a refused handshake could not say why
        if not lets_in(connection):
            await connection.close(NOT_ALLOWED, "the token is missing or wrong, or the page is another site's")
            return
        if n_open >= limits.connections:
            await connection.close(TRY_LATER, f"{limits.connections} clients are connected, which is the limit")
            return
        n_open += 1
        try:
            await serve_socket(connection, connection.path_params["model"], upstream, limits, in_all, live.seen)
        finally:
            n_open -= 1

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(live.run())
        yield
        looking.cancel()
        await upstream.close()

    # Without a token a name that an attacker's DNS points at this machine must not let his page in.
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))] if token is None else []
    return Starlette(lifespan=lifespan, middleware=hosts, routes=[
        Route("/", page), Route("/state", state), Route("/ask/{model}", ask, methods=["POST"]),
        WebSocketRoute("/ws/{model}", socket), Mount("/page", StaticFiles(directory=PAGE))])


def _refusal() -> Response:
    return JSONResponse({"status": 401, "error": "the token is missing or wrong, or the page is another site's"}, 401)
