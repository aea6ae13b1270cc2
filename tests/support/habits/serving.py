"""Habits that a TorchServe serves: their workers, and the answers that clients get."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from urllib.parse import quote

import requests

from early_exit.archiver.control import RunSettings
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import FULL_NAME
from tests.support.client import metrics, session_of
from tests.support.habits.agreement import Answer
from tests.support.habits.habit import Ask, Over
from tests.support.habits.other_clients import over_grpc, through_workflow, workflow

START_S = 240.0
CLIENTS = 8


@dataclass(frozen=True)
class Served:
    """A version of a model in the model store."""

    model: str
    version: str
    file_name: str
    in_workflow: bool = False
    """Whether the version is also a node of a workflow."""

    @property
    def workflow(self) -> str:
        """The workflow's name."""
        return f"wf-{self.model}-{re.sub('[^0-9a-z]', '-', self.version)}"


@contextmanager
def serving(server: TorchServe, versions: Sequence[Served]) -> Iterator[dict[Served, str]]:
    """Serve versions with one worker each inside the block; yield the versions that are not ready, with the causes."""
    management = Management(server.addresses, server.key_file)
    troubles: dict[Served, str] = {}
    for served in versions:
        try:
            management.register(served.file_name, RunSettings(workers=(1, 1)))
        except ServerError as error:
            troubles[served] = str(error)
    registered = [served for served in versions if served not in troubles]
    deadline = time.monotonic() + START_S
    waiting = list(registered)
    while waiting and time.monotonic() < deadline:
        time.sleep(0.3)
        waiting = [served for served in waiting if not _is_ready(management, served)]
    troubles |= dict.fromkeys(waiting, "its worker does not start: " + _last_error(server))
    with ExitStack() as ends:
        for served in registered:
            ends.callback(management.unregister, served.model, served.version)
            if served.in_workflow and served not in troubles:
                ends.enter_context(workflow(server, served.workflow, served.file_name))
        yield troubles


def _is_ready(management: Management, served: Served) -> bool:
    return any(status.version == served.version and status.n_ready for status in management.versions(served.model))


def _last_error(server: TorchServe) -> str:
    lines = (server.state / "logs" / "model.log").read_text(errors="replace").splitlines()
    return " | ".join([line.partition("MODEL_LOG - ")[2] for line in lines if "Error" in line][-4:])


def alone(server: TorchServe, served: Served, asks: Sequence[Ask]) -> list[Answer]:
    """Return the answers to requests that are sent one after the other."""
    session = session_of(server)
    return [_ask(session, server, served, ask) for ask in asks]


def together(server: TorchServe, served: Served, asks: Sequence[Ask]) -> list[Answer]:
    """Return the answers to requests that several clients send, so that TorchServe puts them into batches."""
    sessions = threading.local()

    def one(ask: Ask) -> Answer:
        if not hasattr(sessions, "own"):
            sessions.own = session_of(server)
        return _ask(sessions.own, server, served, ask)

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(one, asks))


def left_and_stayed(server: TorchServe, served: Served, limit_s: float = 5.0) -> tuple[int, int]:
    """Return how many rows left at an exit and how many at the end, by the server's metrics.

    A metric is a line in the worker's output, so it may arrive later than the answer. The figures are taken when both
    numbers are above 0, or at the latest after the limit.
    """
    deadline = time.monotonic() + limit_s
    while True:
        by_exit = _answers_by_exit(metrics(server), served)
        stayed = by_exit.get(FULL_NAME, 0)
        left = sum(by_exit.values()) - stayed
        if (left and stayed) or time.monotonic() > deadline:
            return left, stayed
        time.sleep(0.2)


def _answers_by_exit(text: str, served: Served) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for labels, value in re.findall(r"^ee_answers_total\{(.*?)\} ([\d.e+]+)", text, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="(.*?)"', labels))
        if (named["ModelName"], named["ModelVersion"]) == (served.model, served.version):
            found[named["Exit"]] = found.get(named["Exit"], 0) + round(float(value))
    return found


def _ask(session: requests.Session, server: TorchServe, served: Served, ask: Ask) -> Answer:
    if ask.over is Over.GRPC:
        return over_grpc(server, served.model, served.version, ask.body)
    if ask.over is Over.WORKFLOW:
        return through_workflow(server, served.workflow, ask.body)
    kind = "explanations" if ask.explain else "predictions"
    url = f"{server.addresses.inference}/{kind}/{served.model}/{quote(served.version, safe='')}"
    headers = {"X-Kind": ask.content_type or "none", **({"Content-Type": ask.content_type} if ask.content_type else {})}
    form = [(name, ("file", value, kind)) for name, value, kind in ask.parts]
    try:
        response = session.post(url, data=ask.body or None, files=form or None, headers=headers, timeout=120)
    except requests.RequestException as error:
        return Answer(0, {}, repr(error).encode())
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()},
                  response.content)
