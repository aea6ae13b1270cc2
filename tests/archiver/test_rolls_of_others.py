"""What an operator rolls in while `ee-watch` trains, packs or finishes a roll is not replaced by an earlier plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from early_exit.archiver.control import RunSettings
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.watch.served import finish_roll
from early_exit.archiver.watch.status import ModelStatus
from early_exit.handler.errors import EarlyExitError, ServerError
from early_exit.training.paths import RunPaths
from tests.archiver.test_renewal import decisions
from tests.support.server_in_memory import ServerInMemory
from tests.support.slow_server import plain_mar
from tests.support.virtual_clock import VirtualClock
from tests.support.watched_servers import LIMITS, roll_at_once, serving, watching_servers

MEANWHILE = "another version was brought in meanwhile"


@pytest.fixture
def servers(tmp_path: Path) -> list[ServerInMemory]:
    """Return two servers that serve digits 2.0, and whose store has an operator's digits 5.0."""
    store = tmp_path / "store"
    store.mkdir()
    plain_mar(store, "5.0")
    return [serving(ServerInMemory(name, store)) for name in ("a", "b")]


def operator(*servers: ServerInMemory) -> Callable[[ModelStatus, float, RunPaths], None]:
    """Return a training during which the operator rolls digits 5.0 into servers."""
    return lambda status, certify_after, run: roll_at_once(servers, servers[0].store / "digits-5.0.mar")


def test_what_the_operator_rolls_in_during_the_training_stays_and_the_plan_is_kept_back(
        servers: list[ServerInMemory], tmp_path: Path) -> None:
    with watching_servers(servers, tmp_path / "state") as watcher:
        watcher.training.does = operator(*servers)
        watcher.tick()
        assert [server.default for server in servers] == ["5.0", "5.0"]
        assert decisions(watcher)[-1] == ("kept", MEANWHILE)
        assert [mar.name for mar in servers[0].store.glob("*-6.0.mar")] == []


def test_no_server_is_rolled_while_the_operator_has_rolled_another_one(
        servers: list[ServerInMemory], tmp_path: Path) -> None:
    first, second = servers
    with watching_servers(servers, tmp_path / "state") as watcher:
        watcher.training.does = operator(second)
        for _ in range(5):
            watcher.tick()
        assert (first.default, second.default) == ("2.0", "5.0")
        assert first.calls == []
        assert [event for event, _ in decisions(watcher)][-2:] == ["roll failed", "given up"]
        failed = watcher._watched.audit.read()[-2]
        assert "expected every server to serve digits 2.0, but b serves 5.0" in failed["error"]


def test_a_roll_that_failed_is_given_up_once_the_operator_has_rolled(
        servers: list[ServerInMemory], tmp_path: Path) -> None:
    with watching_servers(servers[:1], tmp_path / "state") as watcher:
        servers[0].register = refuse  # type: ignore[method-assign]
        watcher.tick()
        assert decisions(watcher)[-1][0] == "roll failed"
        del servers[0].register  # type: ignore[method-assign]
        operator(servers[0])(watcher.look(), 0.0, RunPaths(tmp_path))
        watcher.tick()
        assert servers[0].default == "5.0" and decisions(watcher)[-1] == ("given up", MEANWHILE)


def refuse(file_name: str, settings: RunSettings, **more: object) -> None:
    raise ServerError("no room")


def test_a_roll_replaces_only_the_version_that_it_is_meant_to_replace(servers: list[ServerInMemory]) -> None:
    with pytest.raises(ServerError, match=r"5\.0 is to replace digits 4\.0, .* but 2\.0 is: did someone else roll"):
        roll(servers[0], servers[0].store / "digits-5.0.mar", replaces="4.0", clock=VirtualClock(), **LIMITS)
    assert (servers[0].default, servers[0].calls) == ("2.0", [])


def test_what_the_operator_rolls_in_while_a_roll_is_finished_stays(
        servers: list[ServerInMemory], tmp_path: Path) -> None:
    server = servers[0]
    plain_mar(server.store, "3.0")
    server.register("digits-3.0.mar", RunSettings())  # as an interrupted roll leaves it
    remove = server.unregister

    def meanwhile(model: str, version: str) -> None:
        remove(model, version)
        server.unregister = remove  # type: ignore[method-assign]
        roll_at_once([server], server.store / "digits-5.0.mar")

    server.unregister = meanwhile  # type: ignore[method-assign]
    with watching_servers([server], tmp_path / "state") as watcher, pytest.raises(EarlyExitError, match=r"but 5\.0 is"):
        finish_roll(watcher._watched, "2.0", "3.0", "digits-3.0.mar", log=lambda line: None)
    assert list(server.registered) == ["5.0"]
