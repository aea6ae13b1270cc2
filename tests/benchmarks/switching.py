"""For how long after the start of `ee-exits NAME off` exits still answer new requests."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.protocol import EXIT_HEADER, FULL_NAME
from tests.support.client import TIMEOUT_S, session_of

COMMAND = Path(sys.executable).parent / "ee-exits"
_WARM_UP_S, _AFTER_S = 3.0, 3.0


def exits_off_s(server: TorchServe, model: str, bodies: Sequence[bytes], *, times: int = 10, silent_s: float = 60.0,
                clients: int = 8, log: Callable[[str], None] = print) -> float:
    """Return the seconds from the start of the command to the sending of the last request that an exit answered.

    It is the worst of `times` trials under load and of `times` trials after a silence, in which workers have long been
    waiting for a batch. After a silence, the clients begin when the command has returned, so they send the first batch
    that the workers get. Exits are on before each trial, and at the end.

    Args:
        server: a server with a version of the model whose exits answer some of these bodies.
        model: the name of the model.
        bodies: the bodies of the requests.
        times: the number of trials of each kind.
        silent_s: the length of the silence before the command, in trials of the second kind.
        clients: the number of clients. Each sends its next request as soon as it has an answer.
        log: a function that is called with a line about each trial.

    Raises:
        AssertionError: no request left early before the command, a request failed, or a request left early that was
            sent after the command had returned.
    """
    worst = 0.0
    for kind, silence_s in (("under load", 0.0), (f"after {silent_s:.0f} s of silence", silent_s)):
        for number in range(times):
            late_s = _late_s(server, model, bodies, silence_s, clients)
            log(f"{kind}, {number + 1} of {times}: {late_s:.3f} s")
            worst = max(worst, late_s)
    return worst


class _Clients:
    """Clients that send while the block runs. They note when each request was sent, and where it left."""

    def __init__(self, server: TorchServe, model: str, bodies: Sequence[bytes], clients: int) -> None:
        self.seen: list[tuple[float, str]] = []
        """When each request was sent, and where it left, or its status if it failed."""
        self._server, self._url = server, f"{server.addresses.inference}/predictions/{model}"
        self._bodies, self._stop = cycle(bodies), threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> _Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def left_early(self) -> list[float]:
        """Return when the requests that left early were sent. All requests must have been answered."""
        places = {place for _, place in self.seen}
        assert not any(place.isdigit() for place in places), f"requests failed: {places}"
        return [sent for sent, place in self.seen if place != FULL_NAME]

    def _run(self) -> None:
        session = session_of(self._server)
        while not self._stop.is_set():
            body, sent = next(self._bodies), time.monotonic()
            reply = session.post(self._url, data=body, timeout=TIMEOUT_S)
            self.seen.append((sent, reply.headers[EXIT_HEADER] if reply.ok else str(reply.status_code)))


def _late_s(server: TorchServe, model: str, bodies: Sequence[bytes], silence_s: float, clients: int) -> float:
    _switch(server, model, "on")
    with _Clients(server, model, bodies, clients) as before:
        time.sleep(_WARM_UP_S)
        if not silence_s:
            started, returned = _switch_off(server, model)
            time.sleep(_AFTER_S)
    early = before.left_early()
    if silence_s:
        time.sleep(silence_s)
        started, returned = _switch_off(server, model)
        with _Clients(server, model, bodies, clients) as after:
            time.sleep(_AFTER_S)
        early += after.left_early()
    _switch(server, model, "on")
    assert early and min(early) < started, "no request left early before the command, so nothing was switched off"
    assert max(early) < returned, f"a request left early that was sent {max(early) - returned:.3f} s after the command"
    return max(0.0, max(early) - started)


def _switch_off(server: TorchServe, model: str) -> tuple[float, float]:
    """Switch the exits off; return when the command was started, and when it had returned."""
    started = time.monotonic()
    _switch(server, model, "off")
    return started, time.monotonic()


def _switch(server: TorchServe, model: str, position: str) -> None:
    subprocess.run([COMMAND, model, position, "--switches", server.switches], check=True, stdout=subprocess.DEVNULL)
