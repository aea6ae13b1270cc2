"""Where a TorchServe listens, and the tokens that let a client in."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path

from early_exit.handler.errors import ServerError

KEY_FILE = "key_file.json"
"""TorchServe writes its tokens into this file, in the folder it is started in."""


@dataclass(frozen=True)
class Addresses:
    """Where a server listens."""

    inference: str
    management: str
    metrics: str

    @classmethod
    def on_loopback(cls, inference: int = 8080, management: int = 8081, metrics: int = 8082) -> Addresses:
        return cls(*(f"http://127.0.0.1:{port}" for port in (inference, management, metrics)))

    @classmethod
    def free(cls) -> Addresses:
        """Return addresses on three ports that nobody listens on right now."""
        return cls.on_loopback(*free_ports(3))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def read_token(key_file: Path, kind: str) -> str:
    """Return the 'management' or 'inference' token of TorchServe's key file.

    Raises:
        ServerError: the file is missing or not a key file.
    """
    try:
        key: str = json.loads(key_file.read_text())[kind]["key"]
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(f"cannot read the {kind} token from {key_file}: {error!r}. TorchServe writes key_file.json "
                          "into the folder it is started in; pass it with --tokens") from error
    return key
