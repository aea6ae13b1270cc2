"""A keyed hash that tells which records have the same content without revealing the content."""

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
"""The hash of a record whose content is not known."""
_KEY_BYTES = 32
_RAW = (bytes, bytearray)
_SCALARS = frozenset((str, int, float, bool, type(None)))


class ContentKey:
    """The secret with which the contents of one records folder are hashed, shared by all workers that record there.

    Without the key, nobody can test whether a guessed content was recorded. Hosts whose records are used together
    should share one key: contents that were hashed with different keys cannot be compared.
    """

    def __init__(self, root: Path | None) -> None:
        """Use the key of a records folder, which is read or created when it is first needed.

        Args:
            root: the records folder, or None for a key that only this process has.
        """
        self._path = None if root is None else root / KEY_FILE
        self._key: bytes | None = None

    def hash(self, item: Any) -> int:
        """Return a uniform signed 64-bit hash of the handler's input for a request, or for one of its instances.

        Neither the order of the keys of an object nor the type of bytes (bytes or bytearray) changes the hash.

        Args:
            item: JSON in which bytes may stand anywhere.

        Returns:
            The hash, or `UNKNOWN_CONTENT` if the item holds anything else.

        Raises:
            RecordError: the key's file does not hold a key.
            ForeignFileError: the file, or its folder, belongs to somebody else.
            OSError: the key cannot be read or created.
        """
        digest = hmac.new(self._read(), digestmod="sha256")  # SHA-256 because processors have instructions for it
        try:
            for piece in _pieces(item):
                digest.update(piece)
        except (TypeError, ValueError, RecursionError):
            return UNKNOWN_CONTENT
        return max(UNKNOWN_CONTENT + 1, int.from_bytes(digest.digest()[:8], "big", signed=True))

    @property
    def name(self) -> str:
        """A name that identifies the key without revealing it; records say with which key they were hashed.

        Raises:
            RecordError, OSError: as for `hash`.
        """
        key = self._read()
        # If somebody emptied the folder, the next process that uses it must find the same key.
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
        raise RecordError(f"{path} holds {len(key)} bytes, expected a key of {_KEY_BYTES}: delete it, and a new key is "
                          "created; repeats of contents that were recorded before are then not recognized")
    return key


def _publish(key: bytes, path: Path) -> None:
    """Write a key, unless another worker is faster. If the file system has hard links, the file is always complete."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SCRATCH_SUFFIX}")
    try:
        with open_private(scratch, "xb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(scratch, path)  # unlike a rename, a link never replaces the key of another worker
        except FileExistsError:
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # A worker that reads the file before it is written finds no key, and tries again at its next request.
            with suppress(FileExistsError), open_private(path, "xb") as file:
                file.write(key)
    finally:
        scratch.unlink(missing_ok=True)


def _pieces(value: Any) -> Iterator[bytes | bytearray]:
    """Yield an unambiguous encoding of a value: different values give different bytes.

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
        if kinds == {float}:  # such as an image as lists of numbers, which would take long number by number
            yield b"f%d:" % len(value)
            yield struct.pack(f"<{len(value)}d", *value)
        elif kinds <= _SCALARS:
            yield from _as_json(value)
        else:
            yield b"l%d:" % len(value)
            for inner in value:
                yield from _pieces(inner)
    elif kind is str:  # may be an image in base64, so it is not escaped as JSON
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
