"""A client that remembers the body of each request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.sample_request import OCTETS
from tests.support.client import session_of


@dataclass
class Client:
    """A client that sends requests one after the other and remembers the body of each."""

    server: TorchServe
    model: str
    sent: dict[str, str] = field(default_factory=dict)
    """The bodies of answered requests by request ID, in order."""

    def __post_init__(self) -> None:
        self._session = session_of(self.server)
        self._address = f"{self.server.addresses.inference}/predictions/{self.model}"

    def send(self, bodies: Sequence[object], *, may_fail: bool = False) -> None:
        for body in bodies:
            text = json.dumps(body)
            reply = self._session.post(self._address, data=text.encode(), headers={"content-type": OCTETS}, timeout=60)
            if reply.status_code == 200 and isinstance(body, list):
                self.sent[reply.headers["x-request-id"]] = text
            assert may_fail or reply.status_code == 200, reply.text
