"""The server behind the gateway, and what the gateway's messages say of its answers."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from early_exit.archiver.control import Prediction, VersionStatus
from early_exit.archiver.version_metrics import Scrape
from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import (
    CONFIDENCE_HEADER,
    EXIT_HEADER,
    OPINIONS_HEADER,
    STEP_HEADER,
    SWITCH_HEADER,
    VERSION_HEADER,
)

PREDICTION_S = 120.0
"""Limit for a prediction, waiting in the server's queue included."""


class Upstream(Protocol):
    """A server of models, asked without blocking; each method raises a ServerError where it does not answer.

    All but `predict` raise one where it refuses, too.
    """

    async def predict(self, model: str, body: bytes, *, anytime: bool) -> Prediction:
        """Return the answer of a model's default version; with `anytime` it hears what every exit would have said."""

    async def models(self) -> list[str]:
        """Return the names of the models that are registered."""

    async def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model, none when it is not registered."""

    async def metrics(self) -> Scrape:
        """Return what the server has counted.

        Raises:
            ValueError: it answers with something else than metrics.
        """

    async def close(self) -> None:
        """Give back what the connections hold."""


async def answer_item(upstream: Upstream, model: str, body: bytes, *, anytime: bool) -> dict[str, Any]:
    """Return what the messages of the protocol say of an item, but for its id; trouble is a status and an error."""
    started = time.perf_counter()
    try:
        prediction = await upstream.predict(model, body, anytime=anytime)
    except ServerError as error:
        return {"status": 502, "error": str(error)}
    message: dict[str, Any] = {"status": prediction.status,
                               "latency_ms": round(1000 * (time.perf_counter() - started), 2)}
    if prediction.error is not None:
        return {**message, "error": prediction.error}
    return {**message, **_exit_facts(prediction.headers), **_answer(prediction.body)}


def _exit_facts(headers: Mapping[str, str]) -> dict[str, Any]:
    facts = {}
    for key, header, kind in (("exit", EXIT_HEADER, str), ("confidence", CONFIDENCE_HEADER, _finite),
                              ("version", VERSION_HEADER, str), ("step", STEP_HEADER, str),
                              ("switch", SWITCH_HEADER, str), ("opinions", OPINIONS_HEADER, _from_json)):
        if header.lower() in headers:
            facts[key] = kind(headers[header.lower()])
    return facts


def _finite(text: str) -> float | None:
    """Return a number, None for one that JSON has no word for.

    >>> _finite("0.5"), _finite("NaN"), _finite("1e999")
    (0.5, None, None)
    """
    number = float(text)
    return number if math.isfinite(number) else None


_from_json = partial(json.loads, parse_float=_finite, parse_constant=_finite)


def _answer(body: bytes) -> dict[str, Any]:
    try:
        return {"answer": _from_json(body)}
    except (ValueError, RecursionError):
        pass
    try:
        return {"answer": body.decode()}
    except UnicodeDecodeError:
        return {"answer_base64": base64.b64encode(body).decode()}
