"""Checks who may use the gateway: in one place, alike for all kinds of requests, and before a body is read."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

SUBPROTOCOL = "early-exit"
TOKEN_SUBPROTOCOL = "early-exit.token."
"""The prefix of a subprotocol with the token. A page's WebSocket cannot send a header, so it offers `early-exit` and
this prefix with the token as its subprotocols."""


class Access:
    """Middleware that admits requests with the token, to a name of this gateway, but not from pages of other sites."""

    def __init__(self, app: ASGIApp, token: str, names: Collection[str] = ()) -> None:
        """Wrap an application.

        Args:
            app: the application that answers the admitted requests.
            token: the secret that every client sends; only the live page's own files need none.
            names: host names of the gateway, besides 'localhost' and all IP addresses.

        Raises:
            ValueError: the token is empty.
        """
        if not token:
            raise ValueError("expected a token, found an empty one, which everybody could send")
        self._app, self._token = app, token.encode()
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(HTTPConnection(scope)) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(refusal)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, connection: HTTPConnection) -> JSONResponse | None:
        host, origin = connection.headers.get("host", "").lower(), connection.headers.get("origin")
        if not self._is_ours(host):
            return _refused(400, f"{host[:200]!r} is not a name of this gateway: use its IP address, or start it with "
                                 "--host-name")
        if origin is not None and (urlsplit(origin).scheme not in ("http", "https") or urlsplit(origin).netloc != host):
            return _refused(403, "a page of another site may not use this gateway")
        path = connection.scope["path"]
        if path == "/" or path.startswith("/page/") or self._has_token(connection):
            return None
        return _refused(401, "the token is missing or wrong")

    def _is_ours(self, host: str) -> bool:
        """Tell whether a Host header names this gateway.

        A name that an attacker's DNS points at this machine must not admit the attacker's page. An IP address cannot be
        pointed elsewhere.
        """
        with contextlib.suppress(ValueError):
            name = urlsplit(f"//{host}").hostname
            if name is None or "@" in host:
                return False
            return name in self._names or bool(ip_address(name))
        return False

    def _has_token(self, connection: HTTPConnection) -> bool:
        kind, _, sent = connection.headers.get("authorization", "").partition(" ")
        offered = [name.removeprefix(TOKEN_SUBPROTOCOL) for name in connection.scope.get("subprotocols", ())
                   if name.startswith(TOKEN_SUBPROTOCOL)]
        given = [sent.strip(), *offered] if kind.lower() == "bearer" else offered
        return any(secrets.compare_digest(token.encode(errors="replace"), self._token) for token in given)


def _refused(status: int, error: str) -> JSONResponse:
    # The connection is closed, so that nothing that a stranger sends after this is read.
    return JSONResponse({"status": status, "error": error}, status, {"Connection": "close"})
