"""Two rolls of one model at once: one succeeds and stays the default, and neither wrongly reports success."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.archiver.control import Claim, RunSettings
from early_exit.archiver.rollout import rivals
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.rivals import SETTLE_S, SWITCH_S
from early_exit.archiver.rollout.roll import RollReport, roll
from early_exit.handler.errors import ServerError
from tests.support.slow_server import SlowServer, plain_mar
from tests.support.virtual_clock import VirtualClock


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rivals")
    for version in ("1.0", "2.0", "3.0"):
        plain_mar(folder, version)
    return folder


def rolled(server: SlowServer, version: str, **limits: float) -> RollReport:
    return roll(server, server.store / f"digits-{version}.mar", untried=True, longest_batch_s=0.0, clock=server.clock,
                **limits)


def at_once(server: SlowServer, versions: tuple[str, str],
            begin_s: tuple[float, float]) -> list[RollReport | Exception]:
    """Roll two versions from two hosts that share nothing but the server."""
    calls = [(begins, partial(rolled, server, version)) for version, begins in zip(versions, begin_s)]
    with mock.patch.object(rivals.secrets, "token_hex", lambda n: f"{server.draw.getrandbits(32):08x}"):
        return server.clock.run(calls)


def slow(store: Path, seed: int, *, is_first: bool, most_s: float, ready_s: float) -> SlowServer:
    """Return a slow server: without a model if `is_first`, else with digits 1.0, which no roll has registered."""
    server = SlowServer("server", store, clock=VirtualClock(), draw=random.Random(seed), ready_s=ready_s)
    if not is_first:
        server.register("digits-1.0.mar", RunSettings())
    server.most_s = most_s
    return server


def succeeded(outcomes: list[RollReport | Exception]) -> list[RollReport]:
    for outcome in outcomes:
        assert isinstance(outcome, (RollReport, ServerError)), repr(outcome)
    return [outcome for outcome in outcomes if isinstance(outcome, RollReport)]


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), is_first=st.booleans(), are_equal=st.booleans(),
       begin_s=st.tuples(st.floats(0, 2), st.floats(0, 2)), most_s=st.sampled_from([0.0, 0.05, 0.4]),
       ready_s=st.sampled_from([0.0, 3.0, 20.0]))
def test_of_two_rolls_at_once_exactly_one_succeeds_and_stays_the_default(
        store: Path, seed: int, is_first: bool, are_equal: bool, begin_s: tuple[float, float], most_s: float,
        ready_s: float) -> None:
    server = slow(store, seed, is_first=is_first, most_s=most_s, ready_s=ready_s)
    outcomes = at_once(server, ("2.0", "2.0" if are_equal else "3.0"), begin_s)
    [report] = succeeded(outcomes)
    assert [(version, status.is_default) for version, status in server.registered.items()] == [(report.version, True)]


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), is_first=st.booleans(), are_equal=st.booleans(),
       begin_s=st.tuples(st.floats(0, 30), st.floats(0, 30)), most_s=st.floats(0, 5), ready_s=st.floats(0, 30))
def test_however_slow_the_server_is_a_success_stays_unless_a_later_roll_replaces_it(
        store: Path, seed: int, is_first: bool, are_equal: bool, begin_s: tuple[float, float], most_s: float,
        ready_s: float) -> None:
    server = slow(store, seed, is_first=is_first, most_s=most_s, ready_s=ready_s)
    reports = succeeded(at_once(server, ("2.0", "2.0" if are_equal else "3.0"), begin_s))
    stay = {report.version for report in reports} - {report.replaced for report in reports}
    assert len(stay) == min(1, len(reports))
    assert not stay or server.default in stay


def test_a_roll_that_would_take_longer_to_switch_than_its_rivals_wait_gives_up(store: Path) -> None:
    assert SWITCH_S < SETTLE_S
    server = slow(store, 1, is_first=False, most_s=0.0, ready_s=0.0)
    look = server.versions
    server.versions = lambda model: (server.clock.sleep(SWITCH_S), look(model))[1]  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="takes longer than 4 s to report its versions"):
        rolled(server, "2.0", ready_limit_s=30)
    assert (server.default, list(server.registered)) == ("1.0", ["1.0"])


def test_a_switch_whose_answer_is_lost_counts_if_it_took_effect(store: Path) -> None:
    server = slow(store, 1, is_first=False, most_s=0.0, ready_s=0.0)
    switch = server.set_default

    def lost(model: str, version: str, *, limit_s: float) -> None:
        switch(model, version, limit_s=limit_s)
        raise ServerError("no answer")

    server.set_default = lost  # type: ignore[method-assign]
    assert rolled(server, "2.0").replaced == "1.0"
    assert list(server.registered) == ["2.0"]


def test_what_a_roll_that_was_cut_short_left_registered_does_not_stop_the_next(store: Path) -> None:
    server = slow(store, 1, is_first=False, most_s=0.0, ready_s=0.0)
    server.register("digits-3.0.mar", RunSettings(), claim=Claim(7, "ffff"))
    assert rolled(server, "2.0").replaced == "1.0"


def test_a_version_that_is_replaced_while_the_old_one_is_drained_is_no_success(store: Path) -> None:
    server = slow(store, 1, is_first=False, most_s=0.0, ready_s=0.0)
    server.register("digits-3.0.mar", RunSettings())
    remove = server.unregister

    def somebody_switches(model: str, version: str) -> None:
        remove(model, version)
        server.set_default(model, "3.0", limit_s=1.0)

    server.unregister = somebody_switches  # type: ignore[method-assign]
    with pytest.raises(ServerError, match=r"2\.0 was the default, and 3\.0 has taken its place"):
        rolled(server, "2.0")


def test_a_first_version_waits_for_what_is_to_replace_it_and_serves_if_that_fails(store: Path) -> None:
    server = slow(store, 1, is_first=True, most_s=0.01, ready_s=0.0)
    server.ready_at = Unready()
    reports = at_once(server, ("2.0", "3.0"), (0.0, 1.0))
    assert isinstance(reports[0], RollReport) and "was not ready" in str(reports[1])
    assert (server.default, list(server.registered)) == ("2.0", ["2.0"])


class Unready(dict[Claim | None, float]):
    """The workers of every version but the first never start."""

    def get(self, claim: Claim | None, default: float = 0.0) -> float:  # type: ignore[override]
        return float("inf") if claim is not None and claim.ticket > 1 else default


def test_a_roll_does_not_take_the_version_of_another_back_that_has_the_same_number(store: Path) -> None:
    server = slow(store, 1, is_first=False, most_s=0.0, ready_s=0.0)
    register = server.register

    def after_another(file_name: str, settings: RunSettings, **more: Any) -> None:
        register("digits-2.0.mar", settings, claim=Claim(1, "another"))
        register(file_name, settings, **more)

    server.register = after_another  # type: ignore[assignment, method-assign]
    with pytest.raises(ServerError, match="already registered"):
        rolled(server, "2.0")
    assert server.registered["2.0"].claim == Claim(1, "another")


def test_a_roll_of_several_servers_notices_another_that_has_reached_one_of_them_first(store: Path) -> None:
    clock = VirtualClock()
    one, two = (SlowServer(name, store, clock=clock) for name in ("one", "two"))
    for server in (one, two):
        server.register("digits-1.0.mar", RunSettings())
    limits = {"untried": True, "longest_batch_s": 0.0, "clock": clock, "put_back": True}
    outcomes = clock.run([(0.0, lambda: roll_all([one, two], store / "digits-2.0.mar", **limits)),
                          (0.0, lambda: roll_all([two, one], store / "digits-3.0.mar", **limits))])
    assert all("another version of digits has become the default" in str(outcome) for outcome in outcomes), outcomes
    assert (one.default, two.default) == ("1.0", "1.0"), "both were put back"
