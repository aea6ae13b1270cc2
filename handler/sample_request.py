"""Sample requests, which an archive contains so that it can be tried anywhere, and how a host hands parts over."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import ArchiveError
from early_exit.handler.formats import SAMPLES

BODY = "body"
"""TorchServe's name for the only part of a request that is not a form."""
OCTETS = "application/octet-stream"
_CONTENT_TYPE = "content-type"


def content_types_in(headers: Mapping[str, Any]) -> dict[str, str]:
    """Return the content types of a request's parts by their names; TorchServe has them among the request's headers.

    >>> content_types_in({"accept": "*/*", "body": {"content-type": "image/png"}})
    {'body': 'image/png'}
    """
    return {name: str(value[_CONTENT_TYPE]) for name, value in headers.items()
            if isinstance(value, Mapping) and _CONTENT_TYPE in value}


def headers_with(content_types: Mapping[str, str]) -> dict[str, Any]:
    """Return the headers of a request if only the content types of its parts are known."""
    return {name: {_CONTENT_TYPE: content_type} for name, content_type in content_types.items()}


@dataclass(frozen=True)
class Part:
    """One part of a request."""

    value: bytes
    content_type: str = OCTETS
    name: str = BODY

    def handed_over(self) -> Any:
        """Return the part as a handler gets it: TorchServe parses JSON and decodes text.

        A part of any other type, or one that cannot be parsed or decoded, becomes a new bytearray.
        """
        try:
            if self.content_type == "application/json":
                return json.loads(self.value.decode())
            return self.value.decode() if self.content_type.startswith("text") else bytearray(self.value)
        except (ValueError, RecursionError):
            return bytearray(self.value)


@dataclass(frozen=True)
class SampleRequest:
    """One request as a client sends it."""

    parts: tuple[Part, ...]

    @property
    def body(self) -> Part | None:
        """The only part of a request that is not a form, or None if the request is a form."""
        return self.parts[0] if len(self.parts) == 1 and self.parts[0].name == BODY else None

    def inputs(self) -> dict[str, Any]:
        """Return the request as a handler gets it."""
        return {part.name: part.handed_over() for part in self.parts}


def samples_text(samples: Sequence[SampleRequest]) -> str:
    """Return the text in which an archive holds sample requests."""
    return json.dumps(SAMPLES.stamped({"requests": [
        [{"name": part.name, "content_type": part.content_type, "value": base64.b64encode(part.value).decode()}
         for part in sample.parts] for sample in samples]}), indent=1)


def samples_in(layout: ArchiveLayout) -> tuple[SampleRequest, ...]:
    """Return the samples of an extracted archive, which the previous release may have made.

    Raises:
        FormatError: this version does not read the format of the samples.
        ArchiveError: the samples cannot be read.
    """
    samples, body = (file.read_bytes() if file.exists() else None for file in (layout.samples, layout.sample_request))
    return known_samples(samples, body, str(layout.samples))


def known_samples(samples: bytes | None, body: bytes | None, source: str) -> tuple[SampleRequest, ...]:
    """Return the samples of an archive from the contents of its files.

    Args:
        samples: the output of `samples_text`, or None if the archive has no such file.
        body: the body of one request, which the previous release wrote instead, or None.
        source: names the archive's samples in errors.
    """
    if samples is not None:
        return parse_samples(samples, source)
    return () if body is None else (SampleRequest((Part(body),)),)


def parse_samples(text: str | bytes, source: str) -> tuple[SampleRequest, ...]:
    """Read the output of `samples_text`; errors name the source.

    Raises:
        FormatError: this version does not read its format.
        ArchiveError: the text cannot be read.
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
