"""The gateway in front of a stand-in for TorchServe, which gives answers that a real server cannot be made to give."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from early_exit.archiver.gateway.app import create_app
from early_exit.archiver.gateway.dashboard import SHOWN_S, Live
from early_exit.archiver.gateway.messages import BytesInFlight, Limits
from early_exit.archiver.gateway.upstream import Upstream
from early_exit.archiver.gateway.websocket import serve_socket
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import AsyncManagement
from tests.support.gateway import ALLOWED, TOKEN, as_text, connected, receive, serving

ANSWERS = """# TYPE ee_answers_total counter
ee_answers_total{ModelName="digits",ModelVersion="3.0",Exit="full",} %d
"""


@contextmanager
def stand_in(said: Mapping[str, str], headers: Mapping[str, str] | None = None,
             status: int = 200) -> Iterator[Upstream]:
    """Yield a stand-in for TorchServe: it answers a path and query in `said` with its text, and any other with 404."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = said.get(self.path)
            self.send_response(status if body is not None else 404)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield upstream_of(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def upstream_of(url: str) -> Upstream:
    return AsyncManagement(Addresses(url, url, url), None, connections=4, prediction_s=30)


def versions(*models: str) -> dict[str, str]:
    """Return the management API's answers about models with one version each."""
    told = json.dumps([{"modelVersion": "3.0", "modelUrl": "digits-3.0.mar", "workers": [{"status": "READY"}],
                        "minWorkers": 1, "maxWorkers": 1, "jobQueueStatus": {"pendingRequests": 0},
                        "maxBatchDelay": 100, "responseTimeout": 120, "batchSize": 1}])
    return {f"/models/{model}{more}": told for model in models for more in ("", "/all")}


def page(*models: str, following: str | None = None) -> str:
    return json.dumps({"models": [{"modelName": model} for model in models],
                       **({} if following is None else {"nextPageToken": following})})


FIRST = "/models?limit=100&next_page_token=0"


def looked(said: dict[str, str], *later: dict[str, str]) -> list[dict[str, Any]]:
    """Return the page's state after a first look, and after one more look for each change of the server's answers."""
    async def look() -> list[dict[str, Any]]:
        with stand_in(said) as upstream:
            live, states = Live(upstream), []
            for change in ({}, *later):
                said.update(change)
                await live.look()
                states.append(live.state(None))
            await upstream.close()
            return states

    return asyncio.run(look())


def test_numbers_that_json_has_no_word_for_arrive_as_null() -> None:
    opinions = '[{"exit":"full","class":0,"confidence":NaN}]'
    headers = {"X-Early-Exit-Confidence": "nan", "X-Early-Exit-Opinions": opinions}
    with stand_in({"/predictions/digits": '{"a": [NaN, 1.5, -Infinity, 1e999]}'}, headers) as upstream, \
            serving(create_app(upstream, token=TOKEN), Limits()) as address:
        asked = requests.post(f"http://{address}/ask/digits", headers=ALLOWED, data=b"a", timeout=30)
        with connected(address) as socket:
            socket.send(as_text({"a": b"a"}))
            sent = json.loads(socket.recv(timeout=30), parse_constant=pytest.fail)
    for told in (asked.json(), sent):
        assert (told["status"], told["answer"]) == (200, {"a": [None, 1.5, None, None]})
        assert told["confidence"] is None and told["opinions"][0]["confidence"] is None


@pytest.mark.parametrize(("status", "is_answer"), [(200, True), (201, True), (202, True), (400, False), (503, False)])
def test_an_answer_with_any_status_of_a_success_is_an_answer(status: int, is_answer: bool) -> None:
    with stand_in({"/predictions/digits": '{"class": 3}'}, {"X-Early-Exit": "layer1.0"}, status) as upstream, \
            serving(create_app(upstream, token=TOKEN), Limits()) as address:
        told = requests.post(f"http://{address}/ask/digits", headers=ALLOWED, data=b"a", timeout=30).json()
    assert told["status"] == status and ("error" not in told) == is_answer
    assert not is_answer or (told["answer"], told["exit"]) == ({"class": 3}, "layer1.0")


def test_an_item_that_fails_in_the_gateway_is_a_500_and_the_next_is_answered() -> None:
    fails = iter([True, False])

    def seen(model: str, told: dict[str, Any]) -> None:
        if next(fails):
            raise RuntimeError("out of order")

    async def serve(socket: WebSocket) -> None:
        await socket.accept()
        await serve_socket(socket, "digits", upstream, Limits(), asyncio.Semaphore(4), BytesInFlight(1000), seen)

    app = Starlette(routes=[WebSocketRoute("/", serve)])
    with stand_in({"/predictions/digits": "3"}) as upstream, serving(app, Limits()) as address, \
            connect(f"ws://{address}/") as socket:
        for name, status in (("a", 500), ("b", 200)):
            socket.send(as_text({name: b"a"}))
            assert receive(socket, 1)[name]["status"] == status


def test_a_model_that_cannot_be_read_hides_no_other_and_says_so_itself() -> None:
    said = {FIRST: page("broken", "digits"), "/metrics": ANSWERS % 1, **versions("digits")}
    first, second = looked(said, versions("broken") | {"/models/digits": "no JSON"})
    assert first["model"] == "digits" and first["trouble"] is None
    assert [one["version"] for one in first["versions"]] == ["3.0"]
    assert second["trouble"].startswith("The gateway cannot read TorchServe's answer: JSONDecodeError")
    assert second["looked_at"] == first["looked_at"], "what is shown of it is old"


def test_models_beyond_the_first_page_are_found() -> None:
    many = [f"model{number}" for number in range(100)]
    [state] = looked({FIRST: page(*many, following="100"), "/metrics": "", **versions(*many, "last"),
                      "/models?limit=100&next_page_token=100": page("last")})
    assert state["models"] == [*many, "last"]


def test_what_is_older_than_ten_minutes_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> None:
        said = {FIRST: page("digits"), "/metrics": ANSWERS % 1, **versions("digits")}
        with stand_in(said) as upstream:
            live = Live(upstream)
            await live.look()
            said["/metrics"] = ANSWERS % 5
            await live.look()
            await upstream.close()
        now = live.state("digits")["time"]
        assert [one["answers"]["3.0"]["full"] for one in live.state("digits")["looks"]] == [4.0]
        monkeypatch.setattr("early_exit.archiver.gateway.dashboard.time.time", lambda: now + SHOWN_S + 1)
        assert live.state("digits")["looks"] == []

    asyncio.run(look())
