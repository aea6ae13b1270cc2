"""The calls and replies that pass between a host and its worker."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Call:
    """One request of a client."""

    id: str
    """The host's name for the request, the same each time the request is handed over."""
    inputs: Any
    """The input of the user's handler for the request, such as `{"body": bytes}`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """The headers of the request."""
    instances: tuple[Any, ...] | None = None
    """If the host has taken the request out of an envelope: the items that the handler gets instead of `inputs`, one or
    more. If the host does not tell which request of a batch they belong to, the first request has the items of all
    requests, and the others have none."""
    hears_status: bool = True
    """Whether the client receives a status for this request alone. If not, it only learns that a whole batch failed."""

    @property
    def items(self) -> tuple[Any, ...]:
        """The items that the user's handler gets for the request."""
        return (self.inputs,) if self.instances is None else self.instances

    def body(self, results: list[Any]) -> Any:
        """Return the body of a reply to the request.

        Args:
            results: the handler's results, one for each item, or a single one for all of them.
        """
        return results[0] if self.instances is None else results

    def has_header(self, name: str) -> bool:
        """Tell whether the request has a header, whatever its value and whatever the case of its name."""
        return bool(self.header_values(name))

    def header_values(self, name: str) -> list[str]:
        """Return the values of a header; a host may hand over several whose names differ in case.

        TorchServe also lists the parts of a form among the headers, under names that the client chooses. These are not
        headers.
        """
        return [value for header, value in self.headers.items()
                if header.lower() == name.lower() and isinstance(value, str)]

    def without_headers(self, names: Collection[str]) -> Call:
        """Return the same request without some headers, whatever the case of their names."""
        dropped = {name.lower() for name in names}
        kept = {header: value for header, value in self.headers.items() if header.lower() not in dropped}
        return self if len(kept) == len(self.headers) else replace(self, headers=kept)


def share_instances(calls: Sequence[Call]) -> bool:
    """Tell whether the first request of a batch has the instances of all requests, so that their owners are unknown."""
    return any(call.instances == () for call in calls)


@dataclass
class Reply:
    """The answer to one request."""

    body: Any
    """The result of the user's handler for the request, or the body of an error. In an envelope, it is a result for all
    instances of the request; it is an empty list if the first request of the batch has this one's instances."""
    status: int = 200
    """The HTTP status."""
    phrase: str = ""
    """The reason phrase of the status."""
    headers: dict[str, str] = field(default_factory=dict)
    """The headers of the response; "content-type" may be one of them."""


_PLAIN = frozenset((str, bytes, float, int, bool, type(None)))


def own_copy(value: Any) -> Any:
    """Copy a request's input, or a reply's body, so that changes are not seen by other holders of it.

    A value that is nested too deeply for Python, or that refuses to be copied, is returned as it is.
    """
    try:
        return _copied(value)
    except Exception:
        return value


def _copied(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict:
        return {key: inner if type(inner) in _PLAIN else _copied(inner) for key, inner in value.items()}
    if kind is list:  # much faster than deepcopy, which all other kinds are left to
        return [inner if type(inner) in _PLAIN else _copied(inner) for inner in value]
    return copy.deepcopy(value)
