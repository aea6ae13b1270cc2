"""The server behind the gateway, and how its answers become messages of the gateway."""

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
"""The time limit for a prediction, waiting in the server's queue included."""


class Upstream(Protocol):
    """The asynchronous interface of a model server; each method raises a ServerError if the server does not answer.

    All methods except `predict` also raise one if the server refuses.
    """

    async def predict(self, model: str, body: bytes, *, anytime: bool) -> Prediction:
        """Return the answer of a model's default version; with `anytime`, together with the answers of all exits."""

    async def models(self) -> list[str]:
        """Return the names of the models that are registered."""

    async def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model; none if the model is not registered."""

    async def metrics(self) -> Scrape:
        """Return the metrics of the server.

        Raises:
            ValueError: the server answers with something other than metrics.
        """

    async def close(self) -> None:
        """Close the connections."""


async def answer_item(upstream: Upstream, model: str, body: bytes, *, anytime: bool) -> dict[str, Any]:
    """Return the protocol's message about an item, without its id; a failure becomes a status and an error."""
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
    """Return a number; None if JSON cannot express it.

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
