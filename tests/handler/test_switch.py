"""The operator's switch takes effect with the next batch of any version, and an unreadable switch counts as off."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.call import Call, Reply
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.exits.switch import OFF, ON, SWITCHES_VARIABLE, ExitSwitch, Position
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model
from early_exit.handler.protocol import ANYTIME_HEADER, EXIT_HEADER, OPINIONS_HEADER, STEP_HEADER, SWITCH_HEADER
from early_exit.handler.serving.worker import Worker
from early_exit.handler.user_handler.description import HandlerDescription
from tests.handler.test_early_answers import Frontend
from tests.handler.test_early_answers import model as early_model
from tests.handler.test_fallback_levels import backbone, plan, served
from tests.support.foreign import give_away, open_to_others, open_umask
from tests.support.host import MemoryHost, calls_of_rows, worker_of

__all__ = ["backbone", "early_model", "plan"]
BATCH = 5 * torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the switch folder that workers are given; it does not exist yet."""
    folder = tmp_path / "state" / "exits"
    monkeypatch.setenv(SWITCHES_VARIABLE, str(folder))
    return folder


@pytest.fixture
def switch(folder: Path) -> ExitSwitch:
    """Return the switch of the model that is served here, as the operator uses it."""
    return ExitSwitch(folder, "model")


def answered(worker: Worker, batch: torch.Tensor = BATCH) -> list[Reply]:
    replies = worker.step(calls_of_rows([batch], [str(row) for row in range(len(batch))]))
    return [reply for reply in replies if reply is not None]


def exits(replies: list[Reply]) -> set[str]:
    return {reply.headers[EXIT_HEADER] for reply in replies}


def test_off_counts_for_the_next_batch_and_is_exactly_the_full_model(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    model, full = served(backbone, plan), build_model(backbone)
    worker = worker_of(model)
    model(BATCH)
    assert "full" not in exits(answered(worker)) and not torch.equal(model(BATCH), full(BATCH))
    switch.set(OFF)
    replies = answered(worker)
    assert exits(replies) == {"full"} and {reply.headers[SWITCH_HEADER] for reply in replies} == {"off"}
    assert torch.equal(model(BATCH), full(BATCH))
    switch.set(ON)
    replies = answered(worker)
    assert "full" not in exits(replies) and not any(SWITCH_HEADER in reply.headers for reply in replies)


def test_it_is_kept_by_other_versions_other_plans_and_plans_without_certificate(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    worker_of(served(backbone, plan))
    switch.set(OFF)
    for number, other in enumerate((plan, replace(plan, expected_cost=0.5), replace(plan, certificate=None, safer=()))):
        worker = worker_of(served(backbone, other), host=MemoryHost("model", f"{number}.0"))
        assert exits(answered(worker)) == {"full"}
        worker.close()


def test_it_is_told_though_nobody_knows_whose_the_rows_are(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    mixing = HandlerDescription(rows_per_request=None, rows_unknown_because="it mixes them")
    worker = worker_of(served(backbone, plan), description=mixing)
    switch.set(OFF)
    assert [reply.headers for reply in answered(worker)] == [{SWITCH_HEADER: "off"}] * len(BATCH)


def test_it_is_one_models_alone(backbone: Backbone, plan: ExitPlan, folder: Path) -> None:
    worker = worker_of(served(backbone, plan), host=MemoryHost("another"))
    ExitSwitch(folder, "model").set(OFF)
    assert "full" not in exits(answered(worker))


def test_a_level_is_answered_at_or_a_safer_one_where_the_monitor_has_stepped_further(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    model = served(backbone, plan)
    worker = worker_of(model)
    switch.set(Position(2))
    second = model.assembly.layers[1]
    assert exits(answered(worker)) == {second}, "the first exit lets nobody leave at the second fallback level"
    model.fall_back(1)
    replies = answered(worker)
    assert exits(replies) == {second}
    assert {(reply.headers[STEP_HEADER], reply.headers[SWITCH_HEADER]) for reply in replies} == {("1 of 3", "level 2")}
    model.fall_back(3)
    assert exits(answered(worker)) == {"full"}
    switch.set(Position(9))
    model.fall_back(0)
    assert exits(answered(worker)) == {"full"}, "beyond the last setting of the plan"


def test_the_monitor_has_not_stepped_back_where_an_operator_has_and_watches_the_exits_that_answer(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    n_samples = {}
    for position in (OFF, Position(1), ON):
        host = MemoryHost()
        worker = worker_of(served(backbone, plan, sampling_rate=1.0), host=host)
        switch.set(position)
        replies = [reply for _ in range(10) for reply in answered(worker)]
        worker.close()
        replies += answered(worker) + answered(worker)
        assert any(STEP_HEADER in reply.headers for reply in replies) == (position == ON)
        n_samples[position] = host.value("monitor_samples")
    assert n_samples[OFF] == 0, "answers of the whole model say nothing about the exits"
    assert n_samples[Position(1)] > 0, "exits answer at this level, too"


def test_early_answers_leave_by_exits_until_it_is_off_and_calls_in_flight_end_as_they_began(
        early_model: EarlyExitModel, folder: Path) -> None:
    server = Frontend(early_model)
    bodies = (2 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))).tolist()
    server.waiting = {f"before-{number}": body for number, body in enumerate(bodies)}
    server.step()
    ExitSwitch(folder, "numbers").set(OFF)
    server.waiting |= {f"after-{number}": body for number, body in enumerate(bodies)}
    server.finish()
    headers = {name: told for name, (_, _, told) in server.answers.items()}
    before, after = ([told for name, told in headers.items() if name.startswith(when)] for when in ("before", "after"))
    assert {told[EXIT_HEADER] for told in before} > {"full"} and not any(SWITCH_HEADER in told for told in before)
    assert {(told[EXIT_HEADER], told[SWITCH_HEADER]) for told in after} == {("full", "off")}


def test_while_it_is_off_exits_are_not_judged_by_the_time_that_they_do_not_take(
        early_model: EarlyExitModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Frontend(early_model)
    switch, measured = ExitSwitch(folder, "numbers"), list[int]()
    monkeypatch.setattr(early_model.bypass, "ran", lambda n_answered, seconds: measured.append(n_answered))
    server.waiting = {str(number): body for number, body in enumerate(BATCH.tolist())}
    server.finish()
    assert measured, "while it is on, they are"
    switch.set(OFF)
    for _ in range(2):
        server.waiting = {str(number): body for number, body in enumerate(BATCH.tolist())}
        server.step()
        measured.clear()  # drops what began before a call had read the switch
        server.finish()
        assert not measured and {told[EXIT_HEADER] for *_, told in server.answers.values()} == {"full"}


def test_who_asks_for_every_exit_hears_the_whole_model_alone(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    worker = worker_of(served(backbone, plan), config=ServingConfig(open_headers=True))
    switch.set(OFF)
    [reply] = worker.step([Call("1", {}, {"rows": (BATCH[0],), ANYTIME_HEADER: "1"})])
    assert reply is not None and reply.headers[OPINIONS_HEADER].count('"exit"') == 1
    assert '"exit":"full"' in reply.headers[OPINIONS_HEADER] and reply.headers[SWITCH_HEADER] == "off"


def test_the_metric_follows_it_and_the_log_tells_each_turn_once(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch, caplog: pytest.LogCaptureFixture) -> None:
    host = MemoryHost()
    worker = worker_of(served(backbone, plan), host=host)
    assert host.value("exits_switched") == 0
    for position, value in ((OFF, -1), (Position(2), 2), (ON, 0)):
        switch.set(position)
        answered(worker)
        answered(worker)
        assert host.value("exits_switched") == value
        assert caplog.text.count(f"the operator's switch of the exits is now: {position}") == 1
    switch.set(OFF)
    restarted = MemoryHost()
    worker_of(served(backbone, plan), host=restarted)
    assert restarted.value("exits_switched") == -1, "before it has answered anything"


def link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("on\n")
    path.symlink_to(path.parent / "elsewhere")


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "other words": lambda path: path.write_text("On please\n"),
    "nothing": lambda path: path.write_text(""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe on"),
    "no level": lambda path: path.write_text("level -1\n"),
    "a folder": lambda path: path.mkdir(),
    "a link": link,
    "a pipe": lambda path: os.mkfifo(path),
    "no folder at all": lambda path: path.parent.rmdir(),
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_off(damage: Callable[[Path], object], backbone: Backbone, plan: ExitPlan,
                                    switch: ExitSwitch, caplog: pytest.LogCaptureFixture) -> None:
    worker = worker_of(served(backbone, plan))
    assert "full" not in exits(answered(worker)), "no file is on"
    assert switch.path is not None
    damage(switch.path)
    replies = answered(worker)
    assert exits(replies) == {"full"} and {reply.headers[SWITCH_HEADER] for reply in replies} == {"off"}
    assert "is now: off, because it cannot be read: " in caplog.text


def test_another_users_switch_is_off(backbone: Backbone, plan: ExitPlan, switch: ExitSwitch,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(served(backbone, plan))
    switch.set(ON)
    assert switch.path is not None
    give_away(switch.path, monkeypatch)
    assert exits(answered(worker)) == {"full"}


def test_where_the_folder_cannot_be_made_the_exits_are_off(
        backbone: Backbone, plan: ExitPlan, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.mkdir()
    folder.write_text("in its place")
    assert exits(answered(worker_of(served(backbone, plan)))) == {"full"}
    assert "cannot create the folder of the exits' switch" in caplog.text


def test_a_full_disk_keeps_nobody_from_switching_off(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    worker = worker_of(served(backbone, plan))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # files can be created but not written
        with pytest.raises(OSError):
            switch.set(Position(2))
        switch.set(OFF)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exits(answered(worker)) == {"full"}


def test_whoever_writes_it_without_the_command_is_heard(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch) -> None:
    worker = worker_of(served(backbone, plan))
    assert switch.path is not None
    switch.path.write_text("off\n")
    assert exits(answered(worker)) == {"full"}
    switch.path.unlink()
    assert "full" not in exits(answered(worker))


def test_a_worker_without_the_variable_has_no_switch(
        backbone: Backbone, plan: ExitPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCHES_VARIABLE, raising=False)
    worker = worker_of(served(backbone, plan))
    assert worker.model.switch.path is None and "full" not in exits(answered(worker))
    monkeypatch.setenv(SWITCHES_VARIABLE, "exits")
    with pytest.raises(ConfigError, match="expected an absolute path, found 'exits'"):
        worker_of(served(backbone, plan))


def test_the_switch_is_for_this_user_alone_whatever_the_umask(
        backbone: Backbone, plan: ExitPlan, switch: ExitSwitch, folder: Path) -> None:
    with open_umask():
        worker_of(served(backbone, plan))
        switch.set(OFF)
    assert switch.path is not None and switch.path.exists()
    assert open_to_others(folder) == []
