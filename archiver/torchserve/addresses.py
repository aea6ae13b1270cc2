"""The addresses of a TorchServe."""

from __future__ import annotations

import contextlib
import secrets
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from early_exit.handler.errors import ServerError
from early_exit.training.credentials import without_credentials

_PORTS = range(20_000, 32_768)
"""The ports from which free ones are chosen."""


@dataclass(frozen=True)
class Addresses:
    """The addresses on which a server listens."""

    inference: str
    management: str
    metrics: str

    @classmethod
    def on_loopback(cls, inference: int = 8080, management: int = 8081, metrics: int = 8082) -> Addresses:
        return cls(*(f"http://127.0.0.1:{port}" for port in (inference, management, metrics)))

    @classmethod
    def of_interfaces(cls, inference: str, management: str, metrics: str, port: int) -> Addresses:
        """Return addresses on interfaces of this machine: inference at a port, management and metrics at the next two.

        >>> Addresses.of_interfaces("0.0.0.0", "127.0.0.1", "127.0.0.1", 8080).management
        'http://127.0.0.1:8081'
        """
        hosts = (inference, management, metrics)
        return cls(*(f"http://{host}:{number}" for number, host in enumerate(hosts, start=port)))

    @classmethod
    def of_server(cls, text: str) -> Addresses:
        """Return the addresses of "http://host:8080": the next ports are for management and metrics.

        The form "http://host:8080,http://other:9000" names the management address, too.

        Raises:
            ServerError: the text has another form.

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
            raise ServerError(f"expected an inference address such as http://10.0.0.7:8080, found "
                              f"{without_credentials(inference)!r}")
        base = f"{url.scheme}://{url.netloc.rpartition(':')[0]}"
        management = management or f"{base}:{port + 1}"
        return cls(inference.rstrip("/"), management.rstrip("/"), f"{base}:{port + 2}")

    @classmethod
    def free(cls) -> Addresses:
        """Return addresses on three ports that nobody listens on right now."""
        return cls.on_loopback(*free_ports(3))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on right now.

    They lie below those that Linux gives to outgoing connections, one of which could take a port before a server does.
    """
    sockets: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            sockets.append(socket.socket())
            with contextlib.suppress(OSError):  # the port is taken
                sockets[-1].bind(("127.0.0.1", _PORTS.start + secrets.randbelow(len(_PORTS))))
                ports.append(sockets[-1].getsockname()[1])
        return ports
    finally:
        for free in sockets:
            free.close()
