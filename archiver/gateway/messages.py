"""The messages of the gateway's WebSocket.

A client sends batches of items, each with an id of its own choice. As text:

    {"items": [{"id": "a", "data": "<base64>"}, ...], "anytime": false}

or as bytes: the length of a JSON header (4 bytes, big-endian), the header, and the bodies one after the other:

    {"items": [{"id": "a", "size": 3012}, ...], "anytime": false}

For every item, one message is sent as soon as its answer is ready, in any order:

    {"id": "a", "status": 200, "exit": "layer2.0", "confidence": 0.97, "version": "3.0", "latency_ms": 41.3,
     "answer": ...}

`answer` is the JSON or the text that the model's handler returned; for other bytes, there is `answer_base64` instead.
With "anytime" there are also `opinions`, the answers of all exits. An item that cannot be answered has a status of 4xx
or 5xx and an `error`; the other items are not affected. A client that was cut off must send the items without an answer
again, because the gateway keeps nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

HEADER_BYTES = 4
_ID_LENGTH = 200
UNSUPPORTED, TOO_BIG, TRY_LATER = 1003, 1009, 1013
"""WebSocket close codes (RFC 6455, section 7.4.1, and IANA's registry)."""


@dataclass(frozen=True)
class Limits:
    """The limits for clients."""

    items_per_message: int = 64
    bytes_per_item: int = 10 * 2**20
    in_flight: int = 32
    """The number of one connection's items that the server processes at once; until one of them is answered, nothing
    more is read."""
    in_flight_in_all: int = 256
    """The number of all connections' items that the server processes at once."""
    connections: int = 64
    """The number of connections that are open at once; each may hold two messages that wait for their turn."""
    bytes_in_all: int = 128 * 2**20
    """The bytes of messages and answers that are held at once, over all connections. A text may take four times its
    bytes in memory, and so may the values of its JSON while it is read: the process needs six times as much."""

    @property
    def bytes_per_message(self) -> int:
        """The largest size of a message: a few large items, or many small ones."""
        return 4 * self.bytes_per_item

    @property
    def signs_per_message(self) -> int:
        """The largest number of commas, colons and brackets in a message's JSON, ids included; base64 has none."""
        return (_ID_LENGTH + 24) * (self.items_per_message + 1)

    @property
    def bytes_per_header(self) -> int:
        """The largest size of a message's header, in bytes: an id may take twelve bytes for each of its characters."""
        return (12 * _ID_LENGTH + 200) * (self.items_per_message + 1)


class NoRoom(Exception):
    """The gateway holds as many bytes as it may."""


class BytesInFlight:
    """Counts the bytes of messages and answers that the gateway holds, over all connections, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """Yield a share, which is given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            share.give_back()

    def add(self, n_bytes: int) -> None:
        """Count bytes that are now held, or released if the number is negative.

        Raises:
            NoRoom: the bytes would exceed the limit.
        """
        if n_bytes > 0 and self._held + n_bytes > self._limit:
            raise NoRoom(f"the gateway holds {self._held} of {self._limit} bytes: try again later")
        self._held += n_bytes


class Share:
    """The part of the bytes in flight that one connection, or one request, holds."""

    def __init__(self, of_all: BytesInFlight) -> None:
        self._of_all, self._held = of_all, 0

    def take(self, n_bytes: int) -> None:
        """Hold more bytes.

        Raises:
            NoRoom: all connections together would hold too many bytes.
        """
        self._of_all.add(n_bytes)
        self._held += n_bytes

    def give_back(self, n_bytes: int | None = None) -> None:
        """Release a number of bytes; by default all of them."""
        returned = self._held if n_bytes is None else min(n_bytes, self._held)
        self._held -= returned
        self._of_all.add(-returned)


@dataclass(frozen=True)
class Item:
    """One request of a batch."""

    id: str
    body: bytes
    anytime: bool


class Malformed(Exception):
    """A message that cannot be read; the connection is closed with a code and this reason."""

    def __init__(self, reason: str, code: int = UNSUPPORTED) -> None:
        super().__init__(reason)
        self.code = code


def read_message(message: str | bytes, limits: Limits) -> list[Item]:
    """Return the items of a message.

    Raises:
        Malformed: the message is not one of the two kinds, or has too many items.
    """
    if len(message) > limits.bytes_per_message:
        raise Malformed(f"a message may have {limits.bytes_per_message} bytes, this one has {len(message)}", TOO_BIG)
    if isinstance(message, str):
        header = _header(message, limits)
        return [Item(_id(item), _decoded(item), _anytime(header)) for item in _items(header, limits)]
    size = int.from_bytes(message[:HEADER_BYTES], "big")
    if size > limits.bytes_per_header:
        raise Malformed(f"a header may have {limits.bytes_per_header} bytes, this one has {size}", TOO_BIG)
    header, rest = _header(message[HEADER_BYTES:HEADER_BYTES + size], limits), message[HEADER_BYTES + size:]
    items, start = [], 0
    for item in _items(header, limits):
        length = item.get("size")
        if not isinstance(length, int) or isinstance(length, bool) or length < 0:
            raise Malformed(f"item {_id(item)!r} needs its size in bytes, found {length!r}")
        items.append(Item(_id(item), rest[start:start + length], _anytime(header)))
        start += length
    if start != len(rest):
        raise Malformed(f"the items' sizes add up to {start} bytes, {len(rest)} came after the header")
    return items


def _header(text: str | bytes, limits: Limits) -> dict[str, Any]:
    # Small objects take twenty times their text in memory.
    if sum(text.count(sign) if isinstance(text, str) else text.count(sign.encode()) for sign in ",:[{"
           ) > limits.signs_per_message:
        raise Malformed(f"a message with {limits.items_per_message} items needs no more than "
                        f"{limits.signs_per_message} commas, colons and brackets", TOO_BIG)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"expected JSON with the key 'items': {error}") from error
    if not isinstance(header, dict):
        raise Malformed(f"expected JSON with the key 'items', found {type(header).__name__}")
    return header


def _items(header: dict[str, Any], limits: Limits) -> list[dict[str, Any]]:
    items = header.get("items")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Malformed("expected 'items' to be a list of objects")
    if len(items) > limits.items_per_message:
        raise Malformed(f"a message may have {limits.items_per_message} items, this one has {len(items)}", TOO_BIG)
    ids = [_id(item) for item in items]
    if len(set(ids)) < len(ids):
        raise Malformed("the items of a message need different ids")
    return items


def _id(item: dict[str, Any]) -> str:
    name = item.get("id")
    if not isinstance(name, str) or not 0 < len(name) <= _ID_LENGTH:
        raise Malformed(f"every item needs an 'id', a string of at most {_ID_LENGTH} characters, found {name!r:.80}")
    return name


def _decoded(item: dict[str, Any]) -> bytes:
    data = item.get("data")
    if not isinstance(data, str):
        raise Malformed(f"item {_id(item)!r} needs its 'data' in base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"the data of item {_id(item)!r} is not base64: {error}") from error


def _anytime(header: dict[str, Any]) -> bool:
    return header.get("anytime") is True
