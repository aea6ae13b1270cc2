"""A roll needs nothing of a server beyond `control.ModelServer`; these tests use a server in memory."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from early_exit.archiver.control import ModelServer, Prediction, RunSettings
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.roll import RollReport, roll
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.errors import ServerError
from early_exit.handler.sample_request import Part, SampleRequest
from tests.support.plans import write_plan
from tests.support.rewritten import renumbered, rewritten
from tests.support.server_in_memory import ServerInMemory
from tests.support.untried import build_untried
from tests.support.virtual_clock import VirtualClock

LIMITS = {"longest_batch_s": 0.0, "ready_limit_s": 2.0, "drain_limit_s": 2.0, "clock": VirtualClock()}


@pytest.fixture(scope="module")
def store(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model store with digits 2.0 and 3.0, and 4.0 with answers to its sample request."""
    folder = tmp_path_factory.mktemp("in-memory")
    for version in ("2.0", "3.0"):
        build_untried(ArchiveRequest(str(recorder_mar), folder, version=version))
    answers = json.dumps({"layer1.0": {"three": 0.7, "rank": 3}, "full": {"three": 0.9, "rank": 3}}).encode()
    answering = rewritten(folder / "digits-3.0.mar", folder / "answers.mar",
                          **{"early_exit/sample-answers.json": answers})
    renumbered(answering, folder / "digits-4.0.mar", "3.0", "4.0")
    return folder


def serving(name: str, store: Path, **more: Any) -> ServerInMemory:
    """Return a server that serves digits 2.0."""
    server = ServerInMemory(name, store, **more)
    server.register("digits-2.0.mar", RunSettings())
    server.calls.clear()
    return server


def rolled(server: ModelServer, mar: Path) -> RollReport:
    return roll(server, mar, **LIMITS)


@dataclass
class NamedNowAndThen(ServerInMemory):
    """A server with a client that names version 2.0 every three seconds, up to a time. Its queue is always seen empty.
    """

    clock: VirtualClock = field(default_factory=VirtualClock)
    until: float = 0.0
    removed_at: float = math.inf

    def named_requests(self, model: str, version: str) -> float | None:
        return min(self.clock.now(), self.until) // 3 if version == "2.0" else 0.0

    def unregister(self, model: str, version: str) -> None:
        super().unregister(model, version)
        self.removed_at = self.clock.now()


@pytest.mark.parametrize("until", [0.0, 14.0])
def test_a_version_that_a_client_names_now_and_then_is_removed_when_the_client_has_stopped(
        until: float, store: Path) -> None:
    server = NamedNowAndThen("a", store, until=until)
    server.register("digits-2.0.mar", RunSettings())
    roll(server, store / "digits-3.0.mar", longest_batch_s=5.0, drain_limit_s=60.0, clock=server.clock)
    last = until // 3 * 3
    assert last + 5 <= server.removed_at <= last + 11, "the roll itself takes some time before"


def test_a_version_that_a_client_names_for_ever_is_not_removed(store: Path) -> None:
    server = NamedNowAndThen("a", store, until=math.inf)
    server.register("digits-2.0.mar", RunSettings())
    with pytest.raises(ServerError, match="digits 2.0 still had requests after 60 s; it is left registered"):
        roll(server, store / "digits-3.0.mar", longest_batch_s=5.0, drain_limit_s=60.0, clock=server.clock)
    assert set(server.registered) == {"2.0", "3.0"} and server.default == "3.0"


@pytest.mark.parametrize("failing", [{1}, {3, 4}, {1, 2, 5, 6}])
def test_a_version_that_a_client_names_is_not_removed_because_the_count_cannot_be_read_now_and_then(
        failing: set[int], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def named_requests(self: NamedNowAndThen, model: str, version: str) -> float | None:
        calls.append(version)
        return None if len(calls) in failing else self.clock.now() // 3

    monkeypatch.setattr(NamedNowAndThen, "named_requests", named_requests)
    server = NamedNowAndThen("a", store)
    server.register("digits-2.0.mar", RunSettings())
    with pytest.raises(ServerError, match="digits 2.0 still had requests after 60 s"):
        roll(server, store / "digits-3.0.mar", longest_batch_s=5.0, drain_limit_s=60.0, clock=server.clock)


def test_a_server_that_does_not_count_requests_by_version_is_asked_three_times(
        store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a firewall swallows connections to the metrics, each attempt takes seconds."""
    asked: list[str] = []
    monkeypatch.setattr(ServerInMemory, "named_requests", lambda self, model, version: asked.append(version))
    server = ServerInMemory("a", store)
    server.register("digits-2.0.mar", RunSettings())
    rolled(server, store / "digits-3.0.mar")
    assert asked == ["2.0"] * 3 and set(server.registered) == {"3.0"}


def test_a_version_is_tried_out_before_it_is_the_default_and_the_old_one_goes_last(store: Path) -> None:
    server = serving("a", store)
    report = rolled(server, store / "digits-3.0.mar")
    assert (report.version, report.replaced, report.replaced_archive) == ("3.0", "2.0", "digits-2.0.mar")
    assert server.calls == [
        ("register", "3.0"), ("probe", "3.0"), ("predict", "3.0", ""), ("predict", "3.0", "to the end"),
        ("set_default", "3.0"), ("unregister", "2.0")]


def test_a_version_gets_the_workers_that_the_old_one_was_given_while_it_served(store: Path) -> None:
    server = serving("a", store)
    server.scale("digits", "2.0", (3, 3))
    rolled(server, store / "digits-3.0.mar")
    assert server.registered["3.0"].n_workers == 3


def test_a_version_that_fails_its_probe_is_removed_and_the_old_one_goes_on(store: Path) -> None:
    server = serving("a", store, probe_error="the weights are damaged")
    with pytest.raises(ServerError, match="the weights are damaged\ndigits 2.0 keeps serving"):
        rolled(server, store / "digits-3.0.mar")
    assert (server.default, list(server.registered)) == ("2.0", ["2.0"])
    assert "set_default" not in [call[0] for call in server.calls]


def test_a_server_that_loaded_another_archive_of_that_name_is_found_out(store: Path) -> None:
    server = serving("a", store)
    server.probe = lambda model, version: {"backbone": "another", "plan": None}  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="loaded another archive"):
        rolled(server, store / "digits-3.0.mar")
    assert server.default == "2.0"


@pytest.mark.parametrize("exits", [True, False])
def test_a_server_that_loaded_the_archive_without_its_plan_is_found_out(
        exits: bool, recorder_mar: Path, tmp_path: Path) -> None:
    """Only a version whose configuration says so has no exits although its archive has a plan."""
    (tmp_path / "config.yaml").write_text(f"early_exit: {{exits: {str(exits).lower()}}}")
    plan = write_plan(tmp_path / "plan", recorder_mar)
    build_untried(ArchiveRequest(str(recorder_mar), tmp_path, version="2.0"))
    mar = build_untried(ArchiveRequest(str(recorder_mar), tmp_path, version="3.0", plan=plan,
                                       config=tmp_path / "config.yaml"))
    server, backbone = serving("a", tmp_path), read_archive(mar).description.sha256
    server.probe = lambda model, version: {"backbone": backbone, "plan": None}  # type: ignore[method-assign]
    if not exits:
        assert rolled(server, mar).version == "3.0"
        return
    with pytest.raises(ServerError, match="loaded another archive of that name: expected .* found .*'plan': None"):
        rolled(server, mar)


def test_when_a_server_fails_those_that_are_done_get_their_old_version_again(store: Path) -> None:
    done, failing = serving("a", store), serving("b", store, probe_error="out of memory")
    with pytest.raises(ServerError, match="b: out of memory\n.*\na was put back to 2.0"):
        roll_all([done, failing], store / "digits-3.0.mar", put_back=True, **LIMITS)
    assert [(server.default, list(server.registered)) for server in (done, failing)] == [("2.0", ["2.0"])] * 2


def test_without_being_told_to_a_failed_roll_puts_nothing_back(store: Path) -> None:
    done, failing = serving("a", store), serving("b", store, probe_error="out of memory")
    with pytest.raises(ServerError, match="a already serve digits-3.0.mar and keep it"):
        roll_all([done, failing], store / "digits-3.0.mar", **LIMITS)
    assert (done.default, failing.default) == ("3.0", "2.0")


def left_at(exit_: str, **answer: object) -> Prediction:
    return Prediction(200, {"x-early-exit": exit_}, json.dumps(answer).encode(), None)


@pytest.mark.parametrize("answer", [left_at("layer1.0", three=0.7001, rank=3), left_at("full", three=0.9, rank=3)])
def test_without_the_secret_the_sample_must_be_answered_as_where_the_archive_was_made(
        store: Path, answer: Prediction) -> None:
    """The full answer counts too: a control batch runs without exits, and so may a version at a fallback level."""
    server, said = serving("a", store, has_secret=False, answer=answer), list[str]()
    roll(server, store / "digits-4.0.mar", **LIMITS, log=said.append)
    assert server.calls == [("register", "4.0"), ("predict", "4.0", ""), ("set_default", "4.0"), ("unregister", "2.0")]
    assert "answered as it was where the archive was made" in "".join(said)


@pytest.mark.parametrize(("answer", "difference"), [
    (left_at("layer1.0", three=0.72, rank=3), "answer.three is 0.72, expected 0.7"),
    (left_at("layer1.0", three=0.7, rank=4), "answer.rank is 4, expected 3"),
    (left_at("layer1.0", four=0.7, rank=3), "answer is {'four': 0.7, 'rank': 3}, expected {'three': 0.7, 'rank': 3}"),
    (left_at("layer2.0", three=0.7, rank=3), "left at layer2.0, but at layer1.0 or full"),
    (Prediction(200, {}, b"no JSON", None), "left at an unknown exit")])
def test_without_the_secret_a_sample_that_is_answered_otherwise_stops_the_roll(
        store: Path, answer: Prediction, difference: str) -> None:
    server = serving("a", store, has_secret=False, answer=answer)
    with pytest.raises(ServerError, match=re.escape(difference)):
        rolled(server, store / "digits-4.0.mar")
    assert (server.default, list(server.registered)) == ("2.0", ["2.0"])


def test_without_the_secret_the_longest_batch_has_to_be_given_before_anything_is_done(store: Path) -> None:
    server = serving("a", store, has_secret=False)
    with pytest.raises(ServerError, match="pass --longest-batch-s.* or --secret FILE.*EARLY_EXIT_SECRET"):
        roll(server, store / "digits-4.0.mar")
    assert server.calls == []
    empty = ServerInMemory("b", store, has_secret=False)
    assert roll(empty, store / "digits-3.0.mar", clock=VirtualClock()).replaced is None, "nothing has to be drained"


def test_an_archive_that_has_no_answer_of_its_own_is_rolled_and_what_is_not_known_is_said(store: Path) -> None:
    server, said = serving("a", store, has_secret=False), list[str]()
    roll(server, store / "digits-3.0.mar", **LIMITS, log=said.append)
    assert ("predict", "3.0", "") in server.calls and "is not known" in "".join(said)


def test_a_backbone_of_which_no_request_is_known_serves_only_if_it_serves_already_or_is_told_to(
        store: Path, tmp_path: Path) -> None:
    for version in ("2.0", "3.0"):
        rewritten(store / f"digits-{version}.mar", tmp_path / f"digits-{version}.mar", drop="early_exit/samples.json")
    empty = ServerInMemory("a", tmp_path)
    with pytest.raises(ServerError, match=r"digits-3\.0\.mar has no sample request.*--request.*--untried"):
        rolled(empty, tmp_path / "digits-3.0.mar")
    assert empty.calls == []
    request = SampleRequest((Part(b"{}", "application/json"),))
    assert roll(ServerInMemory("b", tmp_path), tmp_path / "digits-3.0.mar", request=request, **LIMITS).version == "3.0"
    assert roll(empty, tmp_path / "digits-3.0.mar", untried=True, **LIMITS).version == "3.0"
    assert rolled(serving("c", tmp_path), tmp_path / "digits-3.0.mar").version == "3.0", "only its heads are new"
