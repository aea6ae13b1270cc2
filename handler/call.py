"""What passes between a host and its worker: calls in, replies out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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

    def has_header(self, name: str) -> bool:
        """Tell whether the request has a header, whatever its value and however a proxy spells its name."""
        return any(header.lower() == name.lower() for header in self.headers)


@dataclass
class Reply:
    """The answer to one request."""

    body: Any
    """What the user's handler returned for the request, or the body of an error."""
    status: int = 200
    """The HTTP status."""
    phrase: str = ""
    """The reason phrase of the status."""
    headers: dict[str, str] = field(default_factory=dict)
    """The headers of the response; "content-type" may be one of them."""
