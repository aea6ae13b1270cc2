"""A roll needs of a server what `control.ModelServer` says, and no more: here it is one in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from early_exit.archiver.control import ModelServer
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.roll import RollReport, roll
from early_exit.handler.errors import ServerError
from tests.support.server_in_memory import ServerInMemory
from tests.support.untried import build_untried

LIMITS = {"longest_batch_s": 0.0, "ready_limit_s": 2.0, "drain_limit_s": 2.0}


@pytest.fixture(scope="module")
def store(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model store with digits 2.0 and 3.0."""
    folder = tmp_path_factory.mktemp("in-memory")
    for version in ("2.0", "3.0"):
        build_untried(ArchiveRequest(str(recorder_mar), folder, version=version))
    return folder


def serving(name: str, store: Path, **more: Any) -> ServerInMemory:
    """Return a server that serves digits 2.0."""
    server = ServerInMemory(name, store, **more)
    server.register("digits-2.0.mar", 1)
    server.calls.clear()
    return server


def rolled(server: ModelServer, mar: Path) -> RollReport:
    return roll(server, mar, **LIMITS)


def test_a_version_is_tried_out_before_it_is_the_default_and_the_old_one_goes_last(store: Path) -> None:
    server = serving("a", store)
    report = rolled(server, store / "digits-3.0.mar")
    assert (report.version, report.replaced, report.replaced_archive) == ("3.0", "2.0", "digits-2.0.mar")
    assert server.calls == [
        ("register", "3.0"), ("probe", "3.0"), ("predict", "3.0", ""), ("predict", "3.0", "to the end"),
        ("set_default", "3.0"), ("unregister", "2.0")]


def test_a_version_gets_the_workers_that_the_old_one_was_given_while_it_served(store: Path) -> None:
    server = serving("a", store)
    server.scale("digits", "2.0", 3)
    rolled(server, store / "digits-3.0.mar")
    assert server.registered["3.0"].n_workers == 3


def test_a_version_that_fails_its_probe_is_removed_and_the_old_one_goes_on(store: Path) -> None:
    server = serving("a", store, probe_error="the weights are damaged")
    with pytest.raises(ServerError, match="the weights are damaged\ndigits 2.0 goes on serving"):
        rolled(server, store / "digits-3.0.mar")
    assert (server.default, list(server.registered)) == ("2.0", ["2.0"])
    assert "set_default" not in [call[0] for call in server.calls]


def test_a_server_that_loaded_another_archive_of_that_name_is_found_out(store: Path) -> None:
    server = serving("a", store)
    server.probe = lambda model, version: {"backbone": "another", "plan": None}  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="loaded another archive"):
        rolled(server, store / "digits-3.0.mar")
    assert server.default == "2.0"


def test_when_a_server_fails_those_that_are_done_get_their_old_version_again(store: Path) -> None:
    done, failing = serving("a", store), serving("b", store, probe_error="out of memory")
    with pytest.raises(ServerError, match="b: out of memory\n.*\na was put back to 2.0"):
        roll_all([done, failing], store / "digits-3.0.mar", put_back=True, **LIMITS)
    assert [(server.default, list(server.registered)) for server in (done, failing)] == [("2.0", ["2.0"])] * 2


def test_without_being_told_to_a_failed_roll_puts_nothing_back(store: Path) -> None:
    done, failing = serving("a", store), serving("b", store, probe_error="out of memory")
    with pytest.raises(ServerError, match="a already serve digits-3.0.mar and are left so"):
        roll_all([done, failing], store / "digits-3.0.mar", **LIMITS)
    assert (done.default, failing.default) == ("3.0", "2.0")
