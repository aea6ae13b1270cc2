"""Where a TorchServe listens, and the tokens that let a client in."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

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
    def of_server(cls, text: str) -> Addresses:
        """Return the addresses of "http://host:8080": the next ports are for management and metrics.

        Raises:
            ServerError: it is not such an address; "http://host:8080,http://other:9000" names both.

        >>> Addresses.of_server("http://10.0.0.7:8080").management
        'http://10.0.0.7:8081'
        """
        inference, _, management = text.partition(",")
        url = urlsplit(inference)
        try:
            host, port = url.hostname, url.port
        except ValueError:
            host = port = None
        if url.scheme not in ("http", "https") or not host or not port:
            raise ServerError(f"expected an inference address such as http://10.0.0.7:8080, found {inference!r}")
        base = f"{url.scheme}://{url.netloc.rpartition(':')[0]}"
        management = management or f"{base}:{port + 1}"
        return cls(inference.rstrip("/"), management.rstrip("/"), f"{base}:{port + 2}")

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
    """Return the 'management', 'inference' or 'API' token of TorchServe's key file.

    Raises:
        ServerError: the file is missing or not a key file.
    """
    try:
        key: str = json.loads(key_file.read_text())[kind]["key"]
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(f"cannot read the {kind} token from {key_file}: {error!r}. TorchServe writes key_file.json "
                          "into the folder it is started in; pass it with --tokens") from error
    return key
