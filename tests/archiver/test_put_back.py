"""A roll that fails leaves one version on all servers: also on the one that fails after its own switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from early_exit.archiver.control import VersionStatus
from early_exit.handler.errors import ServerError
from tests.archiver.test_renewal import decisions
from tests.support.server_in_memory import ServerInMemory
from tests.support.slow_server import plain_mar
from tests.support.watched_servers import NamedByClients, note_roll, roll_at_once, serving, watching_servers


@pytest.fixture
def servers(tmp_path: Path) -> list[ServerInMemory]:
    """Return two servers of digits 2.0 whose store has digits 3.0; on the second one, 2.0 is never idle."""
    store = tmp_path / "store"
    store.mkdir()
    plain_mar(store, "3.0")
    return [serving(kind(name, store)) for kind, name in ((ServerInMemory, "a"), (NamedByClients, "b"))]


def failed_roll(servers: list[ServerInMemory], *, put_back: bool = True) -> str:
    """Roll digits 3.0 into servers, which fails; return the error."""
    with pytest.raises(ServerError) as failure:
        roll_at_once(servers, servers[0].store / "digits-3.0.mar", put_back=put_back)
    return str(failure.value)


def test_the_server_that_fails_after_its_switch_is_put_back_too(servers: list[ServerInMemory]) -> None:
    for some in (servers, servers[1:]):
        error = failed_roll(some)
        assert "2.0 still had requests after 2 s" in error
        assert error.splitlines()[1:] == [f"{server} was put back to 2.0" for server in reversed(some)]
        assert [(server.default, list(server.registered)) for server in some] == [("2.0", ["2.0"])] * len(some)
    assert ("unregister", "2.0") not in servers[1].calls, "it has served all the time"


def test_without_put_back_each_server_keeps_what_it_serves(servers: list[ServerInMemory]) -> None:
    assert "a already serve digits-3.0.mar and keep it" in failed_roll(servers, put_back=False)
    assert [server.default for server in servers] == ["3.0", "3.0"]
    assert list(servers[1].registered) == ["2.0", "3.0"]


def test_an_old_version_that_went_although_its_removal_failed_is_rolled_in_again(
        servers: list[ServerInMemory]) -> None:
    first, _ = servers
    remove = first.unregister

    def lost(model: str, version: str) -> None:
        remove(model, version)
        first.unregister = remove  # type: ignore[method-assign]
        raise ServerError("no answer")

    first.unregister = lost  # type: ignore[method-assign]
    assert "no answer" in (error := failed_roll([first])) and error.endswith("a was put back to 2.0")
    assert list(first.registered) == ["2.0"]


def test_a_switch_that_takes_effect_after_its_answer_was_given_up_is_put_back(servers: list[ServerInMemory]) -> None:
    late = switches_late(servers[0])
    assert failed_roll([late]).splitlines() == [
        "a: the roll of digits 3.0 failed after its switch: no answer in time", "a was put back to 2.0"]
    assert (late.default, list(late.registered)) == ("2.0", ["2.0"])


def switches_late(server: ServerInMemory) -> ServerInMemory:
    """Let the first switch of a server take effect only after the server has reported its versions once more."""
    switch, look = server.set_default, server.versions

    def looked(model: str) -> list[VersionStatus]:
        versions = look(model)
        server.versions = look  # type: ignore[method-assign]
        switch(model, "3.0", limit_s=1.0)
        return versions

    def too_late(model: str, version: str, **limits: Any) -> None:
        server.set_default, server.versions = switch, looked  # type: ignore[method-assign]
        raise ServerError("no answer in time")

    server.set_default = too_late  # type: ignore[method-assign]
    return server


def test_after_a_failure_on_a_server_that_no_longer_answers_nothing_is_said_about_what_it_serves(
        servers: list[ServerInMemory]) -> None:
    down = ServerError("connection refused")

    def goes_down(*arguments: Any, **more: Any) -> None:
        servers[0].versions = mock.Mock(side_effect=down)  # type: ignore[method-assign]
        raise down

    servers[0].register = goes_down  # type: ignore[method-assign]
    assert "it is not known whether digits 2.0 keeps serving" in failed_roll(servers[:1])


def test_a_version_that_the_watcher_gives_up_serves_on_no_server(servers: list[ServerInMemory], tmp_path: Path) -> None:
    with watching_servers(servers, tmp_path / "state") as watcher:
        for _ in range(3):
            watcher.tick()
            assert [(server.default, list(server.registered)) for server in servers] == [("2.0", ["2.0"])] * 2
        assert [event for event, _ in decisions(watcher)] == ["attempt", *["rolling", "roll failed"] * 3, "given up"]
        assert not list(servers[0].store.glob("digits-4.0.mar"))


@pytest.mark.parametrize("tries", [1, 3])
def test_no_version_is_given_up_or_tried_again_while_a_server_serves_it(
        tries: int, servers: list[ServerInMemory], tmp_path: Path) -> None:
    """As after a roll that could not be put back on one server, which made all later tries fail."""
    _, left = servers
    failed_roll([left], put_back=False)
    with watching_servers(servers, tmp_path / "state") as watcher:
        note_roll(watcher, "roll failed", tries)
        with mock.patch.object(left, "set_default", side_effect=ServerError("no answer")):
            watcher.tick()
        assert left.default == "3.0"
        assert [event for event, _ in decisions(watcher)] == ["roll failed", "trouble"]
        watcher.tick()
        assert (left.default, list(left.registered)) == ("2.0", ["2.0"])
        assert decisions(watcher)[2][0] == ("rolling" if tries < 3 else "given up")
