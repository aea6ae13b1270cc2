"""TorchServe as the gateway sees it."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

import httpx

from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import (
    ANYTIME_HEADER,
    CONFIDENCE_HEADER,
    EXIT_HEADER,
    OPINIONS_HEADER,
    STEP_HEADER,
    VERSION_HEADER,
)

Key = Literal["inference", "management"]
Tokens = Callable[[Key], str | None]
"""Returns the token to send, if any; called for each request, as TorchServe renews them."""
Renewed = Callable[[Key, int, str], bool]
"""Told the status and text of an answer, gets a new token where it says that the old one is refused; whether it did."""
PREDICTION_S = 120.0
"""Limit for a prediction, waiting in TorchServe's queue included."""
_LOOK_S = 10.0
"""Limit for everything but predictions."""
_MODELS_A_PAGE = 100
"""More TorchServe does not tell at once."""


class Upstream:
    """A TorchServe's three addresses."""

    def __init__(self, inference: str, management: str, metrics: str, tokens: Tokens, renewed: Renewed, *,
                 connections: int, timeout_s: float = PREDICTION_S) -> None:
        self._inference, self._management, self._metrics, self._tokens = inference, management, metrics, tokens
        self._renewed, self._renewing = renewed, asyncio.Lock()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=5.0, pool=timeout_s), trust_env=False,
            limits=httpx.Limits(max_connections=connections + 4, max_keepalive_connections=connections + 4))

    async def close(self) -> None:
        await self._client.aclose()

    async def predict(self, model: str, body: bytes, *, anytime: bool) -> dict[str, Any]:
        """Return what the messages of the protocol say of an item, but for its id; trouble is a status and an error."""
        started = time.perf_counter()
        headers = {ANYTIME_HEADER: "1"} if anytime else {}
        try:
            reply = await self._send("POST", f"{self._inference}/predictions/{quote(model, safe='')}", "inference",
                                     content=body, headers=headers)
        except (httpx.HTTPError, ServerError) as error:
            return {"status": 502, "error": f"TorchServe does not answer: {error or type(error).__name__}"}
        told: dict[str, Any] = {"status": reply.status_code,
                                "latency_ms": round(1000 * (time.perf_counter() - started), 2)}
        if reply.status_code != 200:
            return {**told, "error": _message(reply)}
        for key, header, kind in (("exit", EXIT_HEADER, str), ("confidence", CONFIDENCE_HEADER, _finite),
                                  ("version", VERSION_HEADER, str), ("step", STEP_HEADER, str),
                                  ("opinions", OPINIONS_HEADER, _from_json)):
            if header in reply.headers:
                told[key] = kind(reply.headers[header])
        return {**told, **_answer(reply)}

    async def models(self) -> list[str]:
        """Return the names of the models that are registered.

        Raises:
            ServerError: TorchServe does not answer, or refuses.
        """
        names: list[str] = []
        page: dict[str, Any] = {"nextPageToken": "0"}
        while "nextPageToken" in page:
            page = await self._json(f"{self._management}/models?limit={_MODELS_A_PAGE}"
                                    f"&next_page_token={page['nextPageToken']}")
            names += (one["modelName"] for one in page["models"])
        return names

    async def versions(self, model: str) -> list[dict[str, Any]]:
        """Return what the management API tells of each version.

        Raises:
            ServerError: TorchServe does not answer, or refuses.
        """
        found: list[dict[str, Any]] = await self._json(f"{self._management}/models/{quote(model, safe='')}/all")
        default = (await self._json(f"{self._management}/models/{quote(model, safe='')}"))[0]["modelVersion"]
        return [{**one, "isDefault": one["modelVersion"] == default} for one in found]

    async def metrics(self) -> str:
        """Return the Prometheus text.

        Raises:
            ServerError: TorchServe does not answer, or refuses.
        """
        return (await self._get(f"{self._metrics}/metrics", "inference")).text

    async def _json(self, url: str) -> Any:
        return (await self._get(url, "management")).json()

    async def _get(self, url: str, token: Key) -> httpx.Response:
        try:
            reply = await self._send("GET", url, token, timeout=_LOOK_S)
        except httpx.HTTPError as error:
            raise ServerError(f"TorchServe does not answer at {url}: {error or type(error).__name__}") from error
        if reply.status_code != 200:
            raise ServerError(f"TorchServe answers {reply.status_code} at {url}: {_message(reply)}")
        return reply

    async def _send(self, method: str, url: str, token: Key, *, headers: dict[str, str] | None = None,
                    **request: Any) -> httpx.Response:
        async def send() -> tuple[str | None, httpx.Response]:
            key = self._tokens(token)
            authorization = {"Authorization": f"Bearer {key}"} if key else {}
            return key, await self._client.request(method, url, headers={**authorization, **(headers or {})}, **request)

        key, reply = await send()
        if reply.status_code not in (400, 401):
            return reply
        async with self._renewing:  # of all that are refused at once, the first gets a new token
            fresh = self._tokens(token) != key or await asyncio.to_thread(
                self._renewed, token, reply.status_code, reply.text)
        return (await send())[1] if fresh else reply


def _finite(text: str) -> float | None:
    """Return a number, None for one that JSON has no word for.

    >>> _finite("0.5"), _finite("NaN"), _finite("1e999")
    (0.5, None, None)
    """
    number = float(text)
    return number if math.isfinite(number) else None


_from_json = partial(json.loads, parse_float=_finite, parse_constant=_finite)


def _answer(reply: httpx.Response) -> dict[str, Any]:
    try:
        return {"answer": _from_json(reply.content)}
    except (ValueError, RecursionError):
        pass
    try:
        return {"answer": reply.content.decode()}
    except UnicodeDecodeError:
        return {"answer_base64": base64.b64encode(reply.content).decode()}


def _message(reply: httpx.Response) -> str:
    try:
        return str(reply.json()["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
