"""Which records have the same content, told by a keyed hash, so that a record does not tell what the content is."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from early_exit.handler.errors import RecordError
from early_exit.handler.files.private import NO_LINKS, SCRATCH_SUFFIX, open_private, private_folder

KEY_FILE = "content.key"
"""Name of the file with the key in a records folder."""
UNKNOWN_CONTENT = -2**63
"""Stands for the content of a record of which it is not known."""
_KEY_BYTES = 32
_RAW = (bytes, bytearray)
_SCALARS = frozenset((str, int, float, bool, type(None)))


class ContentKey:
    """The secret with which the contents of one records folder are hashed, shared by all workers that record there.

    Who does not have it cannot try out whether a content that he guesses was recorded. Hosts whose records are used
    together should be given one key: contents that were hashed with different keys cannot be compared.
    """

    def __init__(self, root: Path | None) -> None:
        """Take a records folder; the key is read, or made, when it is needed first. Without a folder it is this
        process's own."""
        self._path = None if root is None else root / KEY_FILE
        self._key: bytes | None = None

    def hash(self, item: Any) -> int:
        """Return a uniform signed 64-bit hash of what a handler gets for a request, or for one of its instances.

        The order of the keys of objects does not count, nor whether bytes can be changed.

        Args:
            item: JSON in which bytes may stand anywhere.

        Returns:
            `UNKNOWN_CONTENT` where the item holds something else.

        Raises:
            RecordError: the file of the key does not hold one.
            ForeignFileError: the file, or its folder, belongs to somebody else.
            OSError: the key cannot be read or made.
        """
        digest = hmac.new(self._read(), digestmod="sha256")  # which processors have instructions for
        try:
            for piece in _pieces(item):
                digest.update(piece)
        except (TypeError, ValueError, RecursionError):
            return UNKNOWN_CONTENT
        return max(UNKNOWN_CONTENT + 1, int.from_bytes(digest.digest()[:8], "big", signed=True))

    @property
    def name(self) -> str:
        """A name of the key that does not tell it, by which records know which key they were hashed with.

        Raises:
            RecordError, OSError: as of `hash`.
        """
        key = self._read()
        # Where somebody emptied the folder, whoever comes to it next is to have the same key.
        if self._path is not None and not self._path.exists():
            private_folder(self._path.parent)
            _publish(key, self._path)
        return hmac.digest(key, b"name", "sha256")[:8].hex()

    def _read(self) -> bytes:
        if self._key is None:
            self._key = secrets.token_bytes(_KEY_BYTES) if self._path is None else _shared_key(self._path)
        return self._key


def _shared_key(path: Path) -> bytes:
    private_folder(path.parent)
    if not path.exists():
        _publish(secrets.token_bytes(_KEY_BYTES), path)
    with open_private(path, "rb") as file:
        key: bytes = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise RecordError(f"{path} holds {len(key)} bytes, expected a key of {_KEY_BYTES}: delete it, and another one "
                          "is made, by which contents recorded before are not known")
    return key


def _publish(key: bytes, path: Path) -> None:
    """Write a key, unless another worker is faster; it appears complete or not at all where files can be linked."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SCRATCH_SUFFIX}")
    try:
        with open_private(scratch, "xb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, path)  # unlike a rename it leaves the key of another worker in its place
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # Who reads it before it is written finds none, and asks again for the next request.
            with suppress(FileExistsError), open_private(path, "xb") as file:
                file.write(key)
    finally:
        scratch.unlink(missing_ok=True)


def _pieces(value: Any) -> Iterator[bytes | bytearray]:
    """Yield bytes from which a value could be read again, so that different values give different bytes.

    Raises:
        TypeError, ValueError, RecursionError: the value is not JSON with bytes.
    """
    kind = type(value)
    if kind in _RAW:
        yield b"b%d:" % len(value)
        yield value
    elif kind is dict:
        yield b"d%d:" % len(value)
        for key in sorted(value):
            if type(key) is not str:
                raise TypeError(f"expected names in an object, found {key!r:.80}")
            yield from _pieces(key)
            yield from _pieces(value[key])
    elif kind is list:
        kinds = set(map(type, value))
        if kinds == {float}:  # an image as lists of numbers must not be walked through number by number
            yield b"f%d:" % len(value)
            yield struct.pack(f"<{len(value)}d", *value)
        elif kinds <= _SCALARS:
            yield from _as_json(value)
        else:
            yield b"l%d:" % len(value)
            for inner in value:
                yield from _pieces(inner)
    elif kind is str:  # which may be an image too, in base64
        written = value.encode("utf-8", "surrogatepass")
        yield b"s%d:" % len(written)
        yield written
    elif kind in _SCALARS:
        yield from _as_json(value)
    else:
        raise TypeError(f"expected JSON and bytes, found {kind.__name__}")


def _as_json(value: Any) -> Iterator[bytes]:
    written = json.dumps(value).encode()
    yield b"j%d:" % len(written)
    yield written
