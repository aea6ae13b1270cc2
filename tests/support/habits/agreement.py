"""Whether a client would notice that something else answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

TOLERANCE = 1e-4
"""Two numbers are the same within this share of the largest number beside them."""
_ERROR = 400


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    """HTTP status; 0 where there was no answer."""
    headers: Mapping[str, str]
    """By name in lower case."""
    body: bytes

    @property
    def own_headers(self) -> dict[str, str]:
        """Headers that the user's handler has set."""
        return {name: value for name, value in self.headers.items()
                if name.startswith("x-") and name != "x-request-id" and not name.startswith("x-early-exit")}


def difference(found: Answer, expected: Answer, again: Answer, read: Callable[[bytes], object]) -> str:
    """Return in what an answer differs from the expected one; empty where it does not.

    Args:
        found: the answer.
        expected: what the original answers.
        again: what the original answers to the same request once more: where it differs from itself, nothing is
            expected.
        read: what a client makes of a body.
    """
    if expected.status >= _ERROR and found.status >= _ERROR and expected.headers.get("x-model") is None:
        return ""  # of errors that are not the handler's own the client gets another text, and a status that fits
    if found.status != expected.status:
        return f"status {found.status} instead of {expected.status}: {found.body[:300]!r}"
    if found.headers.get("content-type") != expected.headers.get("content-type"):
        return f"{found.headers.get('content-type')} instead of {expected.headers.get('content-type')}"
    if found.own_headers != expected.own_headers:
        return f"headers {found.own_headers} instead of {expected.own_headers}"
    return _differs(read(found.body), read(expected.body), read(again.body), 0.0, "answer")


def _differs(found: object, expected: object, again: object, scale: float, place: str) -> str:
    if type(expected) is not type(again):
        return ""
    if isinstance(expected, dict) and isinstance(again, dict) and isinstance(found, dict):
        return _in_dicts(found, expected, again, place)
    if isinstance(expected, list) and isinstance(again, list) and isinstance(found, list):
        if len(expected) != len(again):
            return ""
        if len(found) != len(expected):
            return f"{place}: {len(found)} values instead of {len(expected)}"
        largest = _largest(expected)
        return next(filter(None, (_differs(*values, largest, f"{place}[{number}]")
                                  for number, values in enumerate(zip(found, expected, again)))), "")
    if _same(expected, again, scale) and not _same(found, expected, scale):
        return f"{place}: {found!r} instead of {expected!r}"
    return ""


def _in_dicts(found: dict[str, object], expected: dict[str, object], again: dict[str, object], place: str) -> str:
    if found.keys() != expected.keys():
        return f"{place}: {list(found)} instead of {list(expected)}"
    largest = _largest(expected.values())
    for own, other in zip(found, expected):
        if own != other and not _same(found[own], expected[other], largest):
            return f"{place}: in the order {list(found)} instead of {list(expected)}"
    return next(filter(None, (_differs(found[key], value, again.get(key), largest, f"{place}[{key!r}]")
                              for key, value in expected.items())), "")


def _largest(values: Iterable[object]) -> float:
    return max((abs(value) for value in values if _is_number(value) and math.isfinite(value)), default=0.0)


def _same(found: object, expected: object, scale: float) -> bool:
    if _is_number(found) and _is_number(expected):
        if not (math.isfinite(found) and math.isfinite(expected)):
            return repr(found) == repr(expected)
        return abs(found - expected) <= TOLERANCE * max(scale, abs(expected))
    return found == expected


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
