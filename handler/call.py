"""What passes between a host and its worker: calls in, replies out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Call:
    """One request of a client."""

    id: str
    """The host's name of the request, the same each time the request is handed over."""
    inputs: Any
    """What the user's handler gets for the request, such as `{"body": bytes}`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """The headers of the request."""
    instances: tuple[Any, ...] | None = None
    """What the handler gets instead of `inputs`, where the host has taken the request out of an envelope: one or more
    items. Of several requests of a batch the first then has all, where the host does not tell whose they are."""
    hears_status: bool = True
    """Whether a status of its own reaches the client; where it does not, only the failure of the whole batch does."""

    @property
    def items(self) -> tuple[Any, ...]:
        """What the user's handler gets for the request."""
        return (self.inputs,) if self.instances is None else self.instances

    def body(self, results: list[Any]) -> Any:
        """Return the body of a reply to the request.

        Args:
            results: of the handler, one for each item; or a single one, which answers for all of them.
        """
        return results[0] if self.instances is None else results

    def has_header(self, name: str) -> bool:
        """Tell whether the request has a header, whatever its value and however a proxy spells its name."""
        return bool(self.header_values(name))

    def header_values(self, name: str) -> list[str]:
        """Return the values of a header; a host may hand over several that differ in the spelling of the name.

        What TorchServe has among the headers for each part of a form, whose name the client chooses, is none.
        """
        return [value for header, value in self.headers.items()
                if header.lower() == name.lower() and isinstance(value, str)]

    def without_headers(self, names: Collection[str]) -> Call:
        """Return the same request without some headers, however their names are spelt."""
        dropped = {name.lower() for name in names}
        kept = {header: value for header, value in self.headers.items() if header.lower() not in dropped}
        return self if len(kept) == len(self.headers) else replace(self, headers=kept)


def share_instances(calls: Sequence[Call]) -> bool:
    """Tell whether the instances of all requests of a batch are with the first, so that nobody knows whose they are."""
    return any(call.instances == () for call in calls)


@dataclass
class Reply:
    """The answer to one request."""

    body: Any
    """What the user's handler returned for the request, or the body of an error; in an envelope for all its instances,
    and an empty list for those requests of a batch whose instances are with the first."""
    status: int = 200
    """The HTTP status."""
    phrase: str = ""
    """The reason phrase of the status."""
    headers: dict[str, str] = field(default_factory=dict)
    """The headers of the response; "content-type" may be one of them."""


_PLAIN = frozenset((str, bytes, float, int, bool, type(None)))


def own_copy(value: Any) -> Any:
    """Return what a host hands over for a request, without a dict, list or bytearray that another holder could see
    change; what is nested too deeply for Python is returned as it is."""
    try:
        return _copied(value)
    except RecursionError:
        return value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: inner if type(inner) in _PLAIN else _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [inner if type(inner) in _PLAIN else _copied(inner) for inner in value]
    return bytearray(value) if isinstance(value, bytearray) else value
