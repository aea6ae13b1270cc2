"""A version on trial that raises an alarm is taken back from every server, whatever an interrupted roll has left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from early_exit.archiver.control import RunSettings
from early_exit.handler.errors import ServerError
from tests.archiver.test_renewal import alarm_at, decisions
from tests.support.server_in_memory import ServerInMemory
from tests.support.slow_server import plain_mar
from tests.support.watched_servers import NamedByClients, WatcherOfServers, note_roll, serving, watching_servers


def half_rolled(name: str, store: Path, kind: type[ServerInMemory] = ServerInMemory,
                calls: list[tuple[str, ...]] | None = None) -> ServerInMemory:
    """Return a server that serves digits 3.0, from which 2.0 is not removed yet."""
    store.mkdir(exist_ok=True)
    server = serving(kind(name, store))
    plain_mar(store, "3.0")
    server.register("digits-3.0.mar", RunSettings())
    server.set_default("digits", "3.0", limit_s=1.0)
    server.calls = [] if calls is None else calls
    return server


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def servers(store: Path) -> list[ServerInMemory]:
    """Return two servers whose roll was interrupted, and whose calls are noted in one list."""
    calls: list[tuple[str, ...]] = []
    return [half_rolled(name, store, calls=calls) for name in ("a", "b")]


@pytest.fixture
def watcher(servers: list[ServerInMemory], tmp_path: Path) -> Iterator[WatcherOfServers]:
    with watching_servers(servers, tmp_path / "state") as watcher:
        note_roll(watcher)
        watcher.monitors = {"3.0": alarm_at(2990)}
        yield watcher


def test_an_old_version_that_still_gets_requests_does_not_keep_a_bad_one_in_service(
        store: Path, tmp_path: Path) -> None:
    server = half_rolled("a", store, NamedByClients)
    with watching_servers([server], tmp_path / "state") as watcher:
        note_roll(watcher)
        watcher.tick()
        assert server.default == "3.0" and "2.0 still had requests" in watcher._watched.audit.read()[-1]["error"]
        watcher.monitors = {"3.0": alarm_at(2990)}
        server.calls.clear()
        watcher.tick()
        assert [event for event, _ in decisions(watcher)][-2:] == ["taking back", "rolled back"]
        assert server.calls == [("set_default", "2.0"), ("unregister", "3.0")], "2.0 served all the time"
        n_events = len(watcher._watched.audit.read())
        watcher.tick()
        assert all(event["version"] != "3.0" for event in watcher._watched.audit.read()[n_events:]), "it is over"


def test_every_server_serves_the_old_version_again_before_the_bad_one_is_waited_for(
        servers: list[ServerInMemory], watcher: WatcherOfServers) -> None:
    watcher.tick()
    assert servers[0].calls == [("set_default", "2.0")] * 2 + [("unregister", "3.0")] * 2
    assert decisions(watcher)[-1][0] == "rolled back"


def test_a_server_that_fails_does_not_keep_the_bad_version_in_service_on_the_others(
        servers: list[ServerInMemory], watcher: WatcherOfServers) -> None:
    first, second = servers
    with mock.patch.object(first, "set_default", side_effect=ServerError("no answer")):
        watcher.tick()
    assert (first.default, list(second.registered)) == ("3.0", ["2.0"])
    assert [event for event, _ in decisions(watcher)][-2:] == ["taking back", "trouble"]
    assert watcher._watched.audit.read()[-1]["error"] == "ServerError: a: no answer"
    watcher.tick()
    assert first.default == "2.0" and decisions(watcher)[-1][0] == "rolled back"


@pytest.mark.parametrize("is_registered", [True, False])
def test_an_old_version_that_is_not_ready_or_removed_is_rolled_in_again(
        is_registered: bool, servers: list[ServerInMemory], watcher: WatcherOfServers) -> None:
    for server in servers:
        server.all["digits"]["2.0"] = replace(server.registered["2.0"], n_ready=0)
        if not is_registered:
            server.unregister("digits", "2.0")
    watcher.tick()
    assert [list(server.registered) for server in servers] == [["2.0"], ["2.0"]]
    assert all(server.registered["2.0"].n_ready for server in servers)
    assert decisions(watcher)[-1][0] == "rolled back"


def test_an_interrupted_roll_without_an_alarm_is_finished(
        servers: list[ServerInMemory], watcher: WatcherOfServers) -> None:
    watcher.monitors = {}
    watcher.tick()
    assert [list(server.registered) for server in servers] == [["3.0"], ["3.0"]]
    assert decisions(watcher)[-1][0] == "rolled"
