"""Requests that an archive carries along, to be answered wherever it is tried out."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from early_exit.handler.errors import ArchiveError
from early_exit.handler.formats import SAMPLES

BODY = "body"
"""TorchServe's name of the only part of a request that is not a form."""
OCTETS = "application/octet-stream"


@dataclass(frozen=True)
class Part:
    """One part of a request."""

    value: bytes
    content_type: str = OCTETS
    name: str = BODY

    def handed_over(self) -> Any:
        """Return what a handler gets for the part: TorchServe parses JSON and decodes texts."""
        try:
            if self.content_type == "application/json":
                return json.loads(self.value.decode())
            return self.value.decode() if self.content_type.startswith("text") else self.value
        except ValueError:
            return self.value


@dataclass(frozen=True)
class SampleRequest:
    """One request as a client sends it."""

    parts: tuple[Part, ...]

    @property
    def body(self) -> bytes:
        """The first part, which is all of a request that is not a form."""
        return self.parts[0].value

    def inputs(self) -> dict[str, Any]:
        """Return what a handler gets for the request."""
        return {part.name: part.handed_over() for part in self.parts}


def samples_text(samples: Sequence[SampleRequest]) -> str:
    """Return requests as an archive holds them."""
    return json.dumps(SAMPLES.stamped({"requests": [
        [{"name": part.name, "content_type": part.content_type, "value": base64.b64encode(part.value).decode()}
         for part in sample.parts] for sample in samples]}), indent=1)


def parse_samples(text: str | bytes, source: str) -> tuple[SampleRequest, ...]:
    """Return what `samples_text` wrote; errors name the source.

    Raises:
        FormatError: its format is not one that this version reads.
        ArchiveError: it cannot be read.
    """
    try:
        content = json.loads(text)
        SAMPLES.require(content, source)
        samples = tuple(SampleRequest(tuple(Part(base64.b64decode(part["value"], validate=True), part["content_type"],
                                                 part["name"]) for part in parts)) for parts in content["requests"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArchiveError(f"cannot read the sample requests in {source}: {error!r}") from error
    if not all(sample.parts for sample in samples):
        raise ArchiveError(f"{source} holds a sample request without any part: is the archive damaged?")
    return samples
