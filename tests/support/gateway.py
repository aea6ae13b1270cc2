"""A gateway on a free port in a thread of this process, and the messages of its WebSocket."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from starlette.applications import Starlette
from websockets.sync.client import ClientConnection, connect

from early_exit.archiver.gateway.app import create_app
from early_exit.archiver.gateway.asgi_server import make_server
from early_exit.archiver.gateway.certificates import Promises
from early_exit.archiver.gateway.dashboard import Decisions
from early_exit.archiver.gateway.messages import BytesInFlight, Limits
from early_exit.archiver.gateway.upstream import PREDICTION_S
from early_exit.archiver.torchserve.addresses import Addresses, free_ports
from early_exit.archiver.torchserve.management import AsyncManagement

TOKEN = "secret"
ALLOWED = {"Authorization": f"Bearer {TOKEN}"}
"""The headers of a client that has access."""


@contextmanager
def gateway(addresses: Addresses, key_file: Path, secret_file: Path | None = None, *, store: Path | None = None,
            limits: Limits | None = None, decisions: Decisions = lambda model: [], token: str = TOKEN) -> Iterator[str]:
    """Yield the host and the port of a gateway in front of a TorchServe."""
    limits = limits or Limits()
    upstream = AsyncManagement(addresses, key_file, secret_file, connections=limits.in_flight_in_all,
                               prediction_s=PREDICTION_S)
    in_flight = BytesInFlight(limits.bytes_in_all)
    app = create_app(upstream, token=token, limits=limits, in_flight=in_flight, decisions=decisions,
                     plans=Promises(store).of if store else lambda file_name: None)
    with serving(app, limits, in_flight) as address:
        yield address


@contextmanager
def serving(app: Starlette, limits: Limits, in_flight: BytesInFlight | None = None) -> Iterator[str]:
    """Yield the host and the port of an application, served as by the gateway's process."""
    [port] = free_ports(1)
    server = make_server(app, "127.0.0.1", port, limits, in_flight or BytesInFlight(limits.bytes_in_all))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def wait_for_state(address: str, holds: Callable[[dict[str, Any]], object], limit_s: float = 30.0) -> dict[str, Any]:
    """Wait until a condition holds for the state that the gateway's live page gets; return that state."""
    deadline = time.monotonic() + limit_s
    while not holds(state := requests.get(f"http://{address}/state", headers=ALLOWED, timeout=30).json()):
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    found: dict[str, Any] = state
    return found


def answered(state: dict[str, Any], version: str) -> Counter[str]:
    """Return the number of a version's answers by exit, as the gateway was told."""
    return sum((Counter(look["answers"].get(version, {})) for look in state["looks"]), Counter())


def connected(address: str, model: str = "digits") -> ClientConnection:
    """Return a connection to the gateway's WebSocket, with the token."""
    return connect(f"ws://{address}/ws/{model}", additional_headers=ALLOWED)


def as_text(bodies: dict[str, bytes], **more: Any) -> str:
    return json.dumps({"items": [{"id": name, "data": base64.b64encode(body).decode()}
                                 for name, body in bodies.items()], **more})


def as_bytes(bodies: dict[str, bytes], **more: Any) -> bytes:
    header = json.dumps({"items": [{"id": name, "size": len(body)} for name, body in bodies.items()], **more}).encode()
    return len(header).to_bytes(4, "big") + header + b"".join(bodies.values())


def receive(socket: ClientConnection, count: int) -> dict[str, dict[str, Any]]:
    """Return the next messages by the IDs of their items, in the order in which they came."""
    told = [json.loads(socket.recv(timeout=60)) for _ in range(count)]
    return {one.pop("id"): one for one in told}
