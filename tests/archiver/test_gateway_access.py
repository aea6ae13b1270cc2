"""The gateway's access control, its time limits for slow clients, and its limits over all clients."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket as sockets
import time
from collections.abc import Iterator

import pytest
import requests
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from early_exit.archiver.control import Prediction, VersionStatus
from early_exit.archiver.gateway import asgi_server
from early_exit.archiver.gateway.access import SUBPROTOCOL, TOKEN_SUBPROTOCOL
from early_exit.archiver.gateway.app import create_app
from early_exit.archiver.gateway.cli import parser
from early_exit.archiver.gateway.messages import TOO_BIG, TRY_LATER, BytesInFlight, Limits
from tests.support.gateway import ALLOWED, TOKEN, as_bytes, connected, receive, serving
from tests.support.waiting import wait_until

SMALL = Limits(bytes_per_item=100_000, bytes_in_all=500_000)


class Server:
    """A model server that answers only when the test allows it, and counts the requests that it is working on."""

    def __init__(self) -> None:
        self.n_working = 0
        self.answers = True
        self.answer = b"3"

    async def predict(self, model: str, body: bytes, *, anytime: bool) -> Prediction:
        self.n_working += 1
        while not self.answers:
            await asyncio.sleep(0.01)
        self.n_working -= 1
        return Prediction(200, {}, self.answer, None)

    async def models(self) -> list[str]:
        return []

    async def versions(self, model: str) -> list[VersionStatus]:
        return []

    async def metrics(self) -> str:
        return ""

    async def close(self) -> None:
        pass


@contextlib.contextmanager
def gateway(limits: Limits, server: Server | None = None) -> Iterator[tuple[str, BytesInFlight]]:
    in_flight = BytesInFlight(limits.bytes_in_all)
    app = create_app(server or Server(), token=TOKEN, names=["gpu1"], limits=limits, in_flight=in_flight)
    with serving(app, limits, in_flight) as address:
        yield address, in_flight


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with gateway(SMALL) as (address, _):
        yield address


def status(address: str, way: str, headers: dict[str, str], query: str = "") -> int:
    """Return the status of a client's first request, which takes one of the three ways: websocket, ask or GET."""
    if way == "websocket":
        host = headers.get("Host", address)
        try:
            with sockets.create_connection(address.split(":")) as plain:  # a client may write any port into Host
                more = {name: value for name, value in headers.items() if name != "Host"}
                with connect(f"ws://{host}/ws/digits{query}", sock=plain, additional_headers=more):
                    return 200
        except InvalidStatus as refusal:
            return refusal.response.status_code
    if way == "ask":
        return requests.post(f"http://{address}/ask/digits{query}", b"a", headers=headers, timeout=30).status_code
    return requests.get(f"http://{address}/{way}{query}", headers=headers, timeout=30).status_code


@pytest.mark.parametrize("way", ["state", "ask", "websocket"])
def test_host_origin_and_token_are_checked_whichever_way_a_client_comes(address: str, way: str) -> None:
    assert status(address, way, ALLOWED) == 200
    assert status(address, way, ALLOWED | {"Origin": f"http://{address}"}) == 200
    for host in ("gpu1", "GPU1:9000", "[::1]:8090", "10.0.0.7"):
        assert status(address, way, ALLOWED | {"Host": host}) == 200
    for host in ("elsewhere.example", "127.0.0.1.elsewhere.example", "x@127.0.0.1", "localhost.", "[::1"):
        if way != "websocket" or not {"[", "@"} & set(host):  # the websockets client itself refuses to send these
            assert status(address, way, ALLOWED | {"Host": host}) == 400
    for origin in ("http://elsewhere.example", "null", "", f"file://{address}", f"http://x@{address}"):
        assert status(address, way, ALLOWED | {"Origin": origin}) == 403
    for sent in ("", "Bearer", "Bearer ", "Bearer wrong", "Bearer s\u00e9cret", f"Basic {TOKEN}", TOKEN):
        assert status(address, way, {"Authorization": sent.encode("latin-1").decode("latin-1")}) == 401
    assert status(address, way, {}) == status(address, way, {}, f"?token={TOKEN}") == 401, "addresses are written down"


def test_the_page_and_its_files_name_no_secret_and_are_had_without_token_but_not_by_another_name(address: str) -> None:
    for path in ("", "page/live.js"):
        assert status(address, path, {}) == 200
        assert status(address, path, {"Host": "elsewhere.example"}) == 400
    for path in ("page/../state", "page/%2e%2e/state", "/state", "page"):
        assert status(address, path, {}) != 200


def test_an_empty_token_is_none() -> None:
    with pytest.raises(ValueError, match="expected a token, found an empty one"):
        create_app(Server(), token="").build_middleware_stack()


def test_a_websocket_of_a_page_has_the_token_as_subprotocol(address: str) -> None:
    offered = [Subprotocol(SUBPROTOCOL), Subprotocol(TOKEN_SUBPROTOCOL + TOKEN)]
    with connect(f"ws://{address}/ws/digits", subprotocols=offered) as socket:
        assert socket.subprotocol == SUBPROTOCOL
    with pytest.raises(InvalidStatus, match="401"), connect(
            f"ws://{address}/ws/digits", subprotocols=[offered[0], Subprotocol(TOKEN_SUBPROTOCOL)]):
        pass


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nA: ",
                                  b"POST /ask/digits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
                                  b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\nx"])
def test_who_sends_nothing_or_too_slowly_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_server, "HEADERS_S", 0.5)
    monkeypatch.setattr(asgi_server, "BODY_S", 0.5)
    with gateway(SMALL) as (address, _):
        with sockets.create_connection(address.split(":"), timeout=30) as slow:
            slow.sendall(sent)
            with pytest.raises(ConnectionError):
                for _ in range(100):
                    slow.sendall(b"a" if sent else b"")
                    slow.settimeout(0.1)
                    with contextlib.suppress(sockets.timeout):
                        if not slow.recv(1):
                            raise ConnectionResetError
        assert status(address, "state", ALLOWED) == 200


def test_who_asks_and_reads_no_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_server, "BODY_S", 0.5)
    many = b"GET /page/live.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5_000  # more than the system buffers
    with gateway(SMALL) as (address, _):
        with sockets.socket() as deaf:
            deaf.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
            deaf.settimeout(30)
            deaf.connect(("127.0.0.1", int(address.split(":")[1])))
            with pytest.raises(ConnectionError):
                for _ in range(1_000):
                    deaf.sendall(many)
        assert status(address, "state", ALLOWED) == 200


@pytest.mark.parametrize("then", [b"", b"\x81\x80\0\0\0\0"], ids=["nothing", "a message that is none"])
def test_who_asks_by_websocket_and_reads_no_answer_is_cut_off(then: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is cut off even after the connection was closed and its waiting bytes are no longer counted."""
    monkeypatch.setattr(asgi_server, "PREDICTION_S", 0.3)
    monkeypatch.setattr(asgi_server, "_BESIDE", 0)
    server = Server()
    server.answer = b'"' + bytes(8_000_000).replace(b"\0", b"x") + b'"'
    question = b'{"items":[{"id":"a","data":"YQ=="},{"id":"b","data":"YQ=="}]}'
    with gateway(Limits(connections=1), server) as (address, _), sockets.socket() as deaf:
        deaf.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(address.split(":")[1])))
        deaf.sendall(f"GET /ws/digits HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
                     "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                     "Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r\n\r\n".encode())
        wait_until(lambda: deaf.recv(4096, sockets.MSG_PEEK).endswith(b"\r\n\r\n"), "no upgrade comes", limit_s=30)
        deaf.sendall(bytes([0x81, 0x80 | len(question)]) + bytes(4) + question + then)
        wait_until(lambda: answers(address), "the client is not cut off", limit_s=30)


def test_clients_that_read_no_answer_hold_up_nobody() -> None:
    """Each client reads one answer. Its next answers wait in the gateway, up to the limit for one connection."""
    server = Server()
    server.answer = b'"' + bytes(8_000_000).replace(b"\0", b"x") + b'"'
    with gateway(Limits(in_flight=2, in_flight_in_all=4), server) as (address, in_flight), \
            contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(reading_little(address)) for _ in range(3)]
        for client in deaf:
            client.send(as_bytes({str(number): b"a" for number in range(4)}))
        wait_until(lambda: in_flight._held > 5.5 * len(server.answer), "too few answers are held", limit_s=30)
        server.answer = b"3"
        with connected(address) as socket:
            socket.send(as_bytes({"a": b"a"}))
            assert json.loads(socket.recv(timeout=10))["answer"] == 3
        assert [len(receive(client, 4)) for client in deaf] == [4] * 3, "what they did not read waited for them"


def reading_little(address: str) -> ClientConnection:
    """Return a connection whose client reads one message ahead, and for which the system buffers little."""
    plain = sockets.socket()
    plain.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    plain.connect(("127.0.0.1", int(address.split(":")[1])))
    return connect(f"ws://{address}/ws/digits", sock=plain, additional_headers=ALLOWED, max_size=None, max_queue=1)


def answers(address: str) -> bool:
    """Tell whether there is room for another connection."""
    try:
        return status(address, "state", ALLOWED) == 200
    except requests.ConnectionError:
        return False


def test_no_more_connections_are_open_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_server, "_BESIDE", 2)
    with gateway(Limits(connections=1)) as (address, _), contextlib.ExitStack() as open_ones:
        for _ in range(3):
            open_ones.enter_context(sockets.create_connection(address.split(":")))
        with pytest.raises(requests.ConnectionError):
            status(address, "state", ALLOWED)


def test_bytes_that_are_held_have_a_limit_over_all_connections_and_are_given_back() -> None:
    server = Server()
    server.answers = False
    with gateway(SMALL, server) as (address, in_flight):
        with connected(address) as first, connected(address) as second, connected(address) as third:
            first.send(as_bytes({name: bytes(99_000) for name in "abc"}))
            second.send(as_bytes({name: bytes(90_000) for name in "de"}))
            wait_until(lambda: server.n_working == 5, "the five requests do not reach the server", limit_s=30)
            with pytest.raises(ConnectionClosed) as refused:  # it comes at the second piece or later
                third.send(iter([bytes(100_000), bytes(100_000)]))  # an unfinished message counts as well
                third.recv(timeout=30)
            assert refused.value.rcvd is not None and refused.value.rcvd.code == TRY_LATER
            assert requests.post(f"http://{address}/ask/digits", bytes(100_000), headers=ALLOWED,
                                 timeout=30).status_code == 503
            server.answers = True
            assert {message["status"] for message in receive(first, 3).values()} == {200}
        wait_until(lambda: in_flight._held == 0, "the bytes are not given back", limit_s=30)
        assert status(address, "ask", ALLOWED) == 200


def test_answers_that_wait_to_be_read_count_among_the_bytes_that_are_held() -> None:
    server = Server()
    server.answer = b'"' + b"x" * 8_000_000 + b'"'  # more than the system buffers
    with gateway(Limits(bytes_in_all=12_000_000), server) as (address, in_flight):
        with sockets.socket() as deaf:
            deaf.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", int(address.split(":")[1])))
            deaf.sendall(f"POST /ask/digits HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
                         "Content-Length: 1\r\n\r\na".encode())
            wait_until(lambda: in_flight._held > 8_000_000, "the answer is not held", limit_s=30)
            assert status(address, "ask", ALLOWED) == 503
        wait_until(lambda: in_flight._held == 0, "the bytes are not given back", limit_s=30)
        assert status(address, "ask", ALLOWED) == 200


def test_a_message_in_a_million_pieces_is_refused() -> None:
    with gateway(SMALL) as (address, _), connected(address) as socket:
        with pytest.raises(ConnectionClosed) as refused:
            socket.send(b"" for _ in range(20_000))
            socket.recv(timeout=30)
        assert refused.value.rcvd is not None and refused.value.rcvd.code == TRY_LATER


@pytest.mark.parametrize("part", ["{}", "[]", '""', "1"])
def test_json_that_would_fill_the_memory_is_refused(address: str, part: str) -> None:
    bomb = '{"items": [], "more": [' + ",".join([part] * 90_000) + "]}"
    for message in (bomb, len(bomb).to_bytes(4, "big") + bomb.encode()):
        with connected(address) as socket:
            socket.send(message)
            with pytest.raises(ConnectionClosed) as refused:
                socket.recv(timeout=30)
        assert refused.value.rcvd is not None and refused.value.rcvd.code == TOO_BIG


def test_ids_of_any_signs_fit_into_a_message(address: str) -> None:
    items = [{"id": ("," * 195 + str(number)).ljust(200, "["), "data": base64.b64encode(b"a").decode()}
             for number in range(64)]
    with connected(address) as socket:
        socket.send(json.dumps({"items": items}))
        assert len(receive(socket, 64)) == 64


def test_by_default_32_items_of_a_connection_and_256_in_all_are_in_flight() -> None:
    promised = parser().parse_args([])
    assert Limits(promised.max_items, promised.max_bytes, promised.in_flight, promised.in_flight_in_all,
                  bytes_in_all=promised.max_bytes_in_all) == Limits()
    server = Server()
    server.answers = False
    with gateway(Limits(), server) as (address, _), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(address)) for _ in range(10)]
        message = as_bytes({str(number): b"a" for number in range(64)})
        for n_sent, client in enumerate(clients, 1):
            client.send(message)
            expected = min(32 * n_sent, 256)
            wait_until(lambda expected=expected: server.n_working == expected, "not as many are asked", limit_s=30)
            time.sleep(0.05)
            assert server.n_working == expected
        server.answers = True
        assert all(len(receive(client, 64)) == 64 for client in clients)
