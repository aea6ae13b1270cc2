"""The handler's input for a recorded request, in a form that a shard can hold and that restores the same input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from early_exit.handler.call import Call
from early_exit.handler.sample_request import headers_with

_RAW = {"bytes": bytes, "bytearray": bytearray}
_SCALARS = frozenset((str, float, int, bool, type(None)))

_Path = tuple[str | int, ...]


@dataclass(frozen=True)
class KeptRequest:
    """The handler's input for a request, or for one instance of it.

    >>> KeptRequest.from_bytes(KeptRequest({"image": b"...", "k": 3}, {"image": "image/png"}).to_bytes())
    KeptRequest(item={'image': b'...', 'k': 3}, content_types={'image': 'image/png'})
    """

    item: Any
    """A dict of named parts, or an instance as an envelope passes it on: JSON, in which bytes may stand anywhere."""
    content_types: Mapping[str, str] = field(default_factory=dict)
    """The known content types of the request's parts, by the names of the parts."""

    def call(self, id_: str) -> Call:
        """Return a call that repeats the request."""
        return Call(id_, self.item, headers_with(self.content_types))

    def to_bytes(self) -> bytes:
        """Return a line of JSON, followed by all bytes of the item as they are.

        Raises:
            TypeError, ValueError, RecursionError: the item holds anything but JSON and bytes.
        """
        raw: list[tuple[_Path, bytes | bytearray]] = []
        form = {"item": _without_raw(self.item, (), raw), "content_types": dict(self.content_types),
                "raw": [[path, type(value).__name__, len(value)] for path, value in raw]}
        return b"".join((json.dumps(form).encode(), b"\n", *(value for _, value in raw)))

    @classmethod
    def from_bytes(cls, kept: bytes) -> KeptRequest:
        """Read the output of `to_bytes`.

        Raises:
            ValueError, KeyError, TypeError, IndexError: the bytes are damaged.
        """
        start = kept.index(b"\n") + 1
        form = json.loads(kept[:start])
        root = [form["item"]]
        for path, kind, size in form["raw"]:
            if start + size > len(kept):
                raise ValueError(f"a kept request ends after {len(kept)} bytes, where {start + size} were expected")
            place: Any = root
            for key in [0, *path][:-1]:
                place = place[key]
            place[[0, *path][-1]] = _RAW[kind](kept[start:start + size])
            start += size
        return cls(root[0], form["content_types"])


def _without_raw(value: Any, path: _Path, raw: list[tuple[_Path, bytes | bytearray]]) -> Any:
    """Return JSON with null in place of bytes, and append the bytes with their paths to `raw`."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind in _RAW.values():
        raw.append((path, value))
        return None
    if kind is list:
        return [inner if type(inner) in _SCALARS else _without_raw(inner, (*path, index), raw)
                for index, inner in enumerate(value)]
    if kind is dict and all(type(key) is str for key in value):
        return {key: _without_raw(inner, (*path, key), raw) for key, inner in value.items()}
    raise TypeError(f"a request with {kind.__name__} at {'/'.join(map(str, path)) or 'its top'} cannot be kept")
