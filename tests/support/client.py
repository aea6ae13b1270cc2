"""Closed-loop REST clients that keep the outcome of every request."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from types import TracebackType

import requests

from early_exit.archiver.torchserve.addresses import free_ports
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Reply:
    """The answer to one request."""

    status: int
    """The HTTP status, or 0 without an answer."""
    body: bytes
    latency_s: float
    exit: str
    version: str
    number: int = -1
    """The number of the body that was sent. Only background load sets it."""

    @property
    def ok(self) -> bool:
        return self.status == 200

    def top(self) -> str:
        """Return the likeliest class of an image classifier's answer."""
        scores = json.loads(self.body)
        return max(scores, key=lambda name: float(scores[name]))


def send(server: TorchServe, model: str, bodies: Sequence[bytes], *, clients: int = 8) -> list[Reply]:
    """Send every body once and return the replies in the order of the bodies."""
    replies: list[Reply | None] = [None] * len(bodies)
    numbers = iter(range(len(bodies)))
    lock = threading.Lock()

    def run() -> None:
        session = session_of(server)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            replies[number] = _post(session, server, model, bodies[number])

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered = [reply for reply in replies if reply is not None]
    assert len(answered) == len(bodies), "a client has ended before its last request"
    return answered


def send_openly(server: TorchServe, model: str, bodies: Sequence[bytes], rate: float, *, seed: int = 0,
                clients: int = 64) -> list[Reply]:
    """Send every body once, at the times of a Poisson process, whether or not earlier requests have been answered.

    Args:
        rate: the number of requests per second.
        seed: the seed of the times.
        clients: the most requests that wait for their answers at the same time.

    Returns:
        The replies in the order of the bodies. A latency counts from the time at which the request was due.
    """
    random_times = random.Random(seed)
    due = list(accumulate(random_times.expovariate(rate) for _ in bodies))
    sessions = threading.local()
    started = time.perf_counter()

    def one(number: int) -> Reply:
        if not hasattr(sessions, "own"):
            sessions.own = session_of(server)
        reply = _post(sessions.own, server, model, bodies[number])
        return replace(reply, latency_s=time.perf_counter() - started - due[number])

    with ThreadPoolExecutor(clients) as pool:
        waiting = []
        for number, at in enumerate(due):
            time.sleep(max(0.0, started + at - time.perf_counter()))
            waiting.append(pool.submit(one, number))
        return [future.result() for future in waiting]


class BackgroundLoad:
    """Clients that send the bodies again and again while the block runs."""

    def __init__(self, server: TorchServe, model: str, bodies: Sequence[bytes], *, clients: int = 4,
                 pause_s: float = 0.02) -> None:
        """Take what is sent.

        Args:
            server: the server, which must serve the model.
            model: the name of the model.
            bodies: the bodies of the requests.
            clients: the number of clients. Each sends its next request after it has the answer.
            pause_s: how long a client then waits. Without a pause, the clients take the time of the processor that the
                server needs to start a new version.
        """
        self.replies: list[Reply] = []
        self._pause_s = pause_s
        self._server, self._model, self._bodies = server, model, bodies
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(start,)) for start in range(clients)]

    def __enter__(self) -> BackgroundLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, start: int) -> None:
        session = session_of(self._server)
        number = start
        while not self._stop.is_set():
            reply = _post(session, self._server, self._model, self._bodies[number % len(self._bodies)])
            self.replies.append(replace(reply, number=number % len(self._bodies)))
            number += len(self._threads)
            self._stop.wait(self._pause_s)


def metrics(server: TorchServe) -> str:
    """Return the server's metrics as Prometheus reads them."""
    return session_of(server).get(f"{server.addresses.metrics}/metrics", timeout=10).text


def failed(replies: Sequence[Reply]) -> int:
    """Return how many of the requests that were sent did not get the status 200."""
    assert replies, "nothing was sent, so that nothing failed shows nothing"
    return sum(not reply.ok for reply in replies)


def latency_ms(replies: Sequence[Reply], quantile: float) -> float:
    """Return a quantile of the latencies in milliseconds."""
    ordered = sorted(reply.latency_s for reply in replies)
    return 1000 * ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


def session_of(server: TorchServe) -> requests.Session:
    """Return a session that sends the inference token and ignores proxies of the environment."""
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {read_token(server.key_file, 'inference')}"
    return session


def _post(session: requests.Session, server: TorchServe, model: str, body: bytes) -> Reply:
    started = time.perf_counter()
    try:
        response = session.post(f"{server.addresses.inference}/predictions/{model}", data=body, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        return Reply(0, repr(error).encode(), time.perf_counter() - started, "", "")
    return Reply(response.status_code, response.content, time.perf_counter() - started,
                 response.headers.get("X-Early-Exit", ""), response.headers.get("X-Early-Exit-Version", ""))


def consecutive_free_ports() -> int:
    """Return the first of three consecutive ports on which no process listens at the moment."""
    for _ in range(50):
        (first,) = free_ports(1)
        if not any(_in_use(first + offset) for offset in range(3)):
            return first
    raise AssertionError("no three free ports in a row")


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
