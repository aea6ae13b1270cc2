"""On which records a renewal is decided when training takes time, fails or is refused, and when a trial is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import torch

from early_exit.archiver.watch import watcher as watching
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.triggers import Terms
from early_exit.archiver.watch.watched import Watched
from early_exit.archiver.watch.watcher import Watcher
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.errors import EarlyExitError, RecordError, TooFewRecordsError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor.sequential_test import Alarm, Evidence, MonitorState
from early_exit.training.data.split import Part, split_in_time
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from tests.archiver.test_triggers import PLAN

START = time.time() - 50_000
"""The Unix time of the first record; one record comes each second."""
CERTIFICATE = replace(PLAN.certificate, window=(START - 2000, START - 1000)) if PLAN.certificate else None
SERVED = replace(PLAN, certificate=CERTIFICATE)
BETTER = replace(SERVED, expected_cost=0.5)
BACKBONE = cast(BackboneDescription, SimpleNamespace(sha256="ab"))


def alarm_at(second: float) -> MonitorState:
    return MonitorState(1, Evidence(), (Alarm(0, START + second, 200, 0.2, 21.0),))


def seen(n_records: int, *monitors: MonitorState, plan: ExitPlan | None = SERVED,
         version: str = "2.0") -> ModelStatus:
    times = START + torch.arange(n_records).double()
    return ModelStatus("digits", version, (version,), Path(f"digits-{version}.mar"), BACKBONE, plan, "", (), times,
                       monitors)


@dataclass
class Training:
    """Stands for a training, which would take minutes."""

    does: Callable[[ModelStatus, float, RunPaths], None] = lambda status, certify_after, run: None
    """What happens in the meantime."""
    plan: ExitPlan = BETTER
    asked: list[float] = field(default_factory=list)
    """The second of the newest record of each training."""


class WatcherOfSights(Watcher):
    """A watcher with a real audit, which looks at `sight` instead of a server, and trains with `training`."""

    sight: ModelStatus
    training: Training

    def look(self) -> ModelStatus:
        return self.sight

    def _train(self, status: ModelStatus, certify_after: float, run: RunPaths) -> tuple[ExitPlan, float | None]:
        self.training.asked.append(status.times[-1].item() - START)
        self.training.does(status, certify_after, run)
        return self.training.plan, 0.7


@pytest.fixture
def rolled() -> Iterator[list[str]]:
    """The archives that were rolled in."""
    names: list[str] = []

    def build(request: object, log: object) -> Path:
        mar: Path = request.to / f"digits-{request.version}.mar"  # type: ignore[attr-defined]
        mar.write_bytes(b"")
        return mar

    with mock.patch.object(watching, "build_archive", build), \
            mock.patch.object(watching, "roll_all", lambda servers, mar, **settings: names.append(mar.name)):
        yield names


@pytest.fixture
def watcher(tmp_path: Path, rolled: list[str]) -> WatcherOfSights:
    (tmp_path / "store").mkdir()
    watcher = WatcherOfSights(Watched(
        "digits", [], tmp_path / "store", [str(tmp_path)], tmp_path / "state", lambda archive: TrainingOptions(), None,
        Terms(0.02, 0.05, 30 * 24 * 3600.0), trial_samples=300, longest_batch_s=1.0))
    watcher.sight, watcher.training = seen(3000), Training()
    return watcher


def decisions(watcher: Watcher) -> list[tuple[str, str]]:
    return [(event["event"], event.get("why", "")) for event in watcher._watched.audit.read()]


def test_a_better_plan_is_rolled_in_if_no_alarm_comes(watcher: WatcherOfSights, rolled: list[str]) -> None:
    watcher.tick()
    assert [event for event, _ in decisions(watcher)] == ["attempt", "rolling", "rolled"]
    assert len(rolled) == 1


@pytest.mark.parametrize("by_its_clock", [5000, 2900])
def test_a_plan_is_not_rolled_in_if_an_alarm_comes_while_it_is_trained(
        by_its_clock: int, watcher: WatcherOfSights, rolled: list[str]) -> None:
    """The clock of the host with the alarm may be behind that of the host with the newest record."""
    def drift(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
        watcher.sight = seen(9000, alarm_at(by_its_clock))

    watcher.training.does = drift
    watcher.tick()
    assert [event for event, _ in decisions(watcher)] == ["attempt", "kept"]
    assert decisions(watcher)[-1] == ("kept", "an alarm came meanwhile")
    assert not rolled and not list(watcher._watched.store.iterdir())


def test_an_alarm_that_was_known_when_the_training_began_is_not_taken_for_a_new_one(
        watcher: WatcherOfSights, rolled: list[str]) -> None:
    watcher.sight = seen(9000, alarm_at(5000))
    watcher.training.does = lambda status, certify_after, run: None
    watcher.tick()
    assert [event for event, _ in decisions(watcher)] == ["attempt", "rolling", "rolled"]


def test_an_alarm_between_two_tries_begins_a_new_renewal_on_what_came_after_it(watcher: WatcherOfSights) -> None:
    def fail(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
        raise MemoryError

    watcher.training.does = fail
    watcher.tick()
    watcher.sight = seen(9000, alarm_at(5000))
    watcher.training.does = lambda status, certify_after, run: None
    watcher.tick()
    assert decisions(watcher)[2] == ("kept", "an alarm came meanwhile")
    renewed = watcher._watched.audit.read()[3]
    assert (renewed["reason"], renewed["certify_after"]) == ("alarm", START + 5000)


def test_a_roll_that_failed_is_given_up_if_an_alarm_has_come(watcher: WatcherOfSights, rolled: list[str]) -> None:
    def refuse(servers: object, mar: Path, **settings: object) -> None:
        raise EarlyExitError("no")

    with mock.patch.object(watching, "roll_all", refuse):
        watcher.tick()
    watcher.sight = seen(3500, alarm_at(3200))
    watcher.tick()
    assert [event for event, _ in decisions(watcher)] == ["attempt", "rolling", "roll failed", "given up"]
    assert decisions(watcher)[-1] == ("given up", "an alarm came meanwhile")
    assert not rolled and not list(watcher._watched.store.iterdir())


def test_no_renewal_begins_until_a_record_is_newer_than_the_last_alarm(watcher: WatcherOfSights) -> None:
    again = MonitorState(2, Evidence(), (*alarm_at(100).alarms, *alarm_at(3000).alarms))
    watcher.sight = seen(3000, again)
    watcher.tick()
    assert not decisions(watcher)
    watcher.sight = seen(3002, again)
    watcher.tick()
    assert watcher._watched.audit.read()[0]["certify_after"] == START + 100


def refuse_by_losses(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
    """Do what a training does that finds too many losses."""
    run.root.mkdir(parents=True, exist_ok=True)
    run.predictions.touch()
    raise RecordError("the records cannot certify 2.00%")


def test_a_try_that_takes_newer_records_is_noted_with_them_so_that_none_certifies_twice(
        watcher: WatcherOfSights) -> None:
    def fail(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
        raise MemoryError

    watcher.training.does = fail
    watcher.tick()
    watcher.sight = seen(15000)
    watcher.training.does = refuse_by_losses
    watcher.tick()
    assert [event["newest_record"] - START for event in watcher._watched.audit.read()
            if event["event"] == "attempt"] == watcher.training.asked == [2999, 14999]
    watcher.tick()
    assert len(watcher.training.asked) == 2, "all records were tested"


def test_a_try_that_continues_with_the_records_of_the_first_one_is_noted_with_those(watcher: WatcherOfSights) -> None:
    def fail(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
        run.root.mkdir(parents=True, exist_ok=True)
        run.inputs.write_text("{}")
        raise MemoryError

    watcher.training.does = fail
    watcher.tick()
    watcher.sight = seen(15000)
    watcher.tick()
    attempts = [event for event in watcher._watched.audit.read() if event["event"] == "attempt"]
    assert [event["newest_record"] - START for event in attempts] == [2999, 2999]


SCENE = 5
"""The number of records of one scene."""
STATES = (torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)).repeat_interleave(SCENE, 0)
          + 0.1 * torch.randn(2000 * SCENE, 6, generator=torch.Generator().manual_seed(1)))
"""The backbone's outputs for records in scenes."""


def require_enough_scenes(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
    """Do what a training does before it looks at losses."""
    index, all_of_them = torch.arange(len(status.times)), torch.ones(len(status.times), dtype=torch.bool)
    split = split_in_time(STATES[:len(index)], index, index, index, index.double(), all_of_them,
                          status.times > certify_after, all_of_them)
    split.evidence().require_enough(Risk.DISAGREEMENT, 0.02, 0.05, Part.CERTIFY.share)


def test_traffic_in_scenes_gets_its_plan_after_few_refused_attempts(
        watcher: WatcherOfSights, rolled: list[str]) -> None:
    """A refused attempt once made all records old, so that there were never enough."""
    watcher.training.does = require_enough_scenes
    for n_records in range(900, 2000 * SCENE, 100):
        watcher.sight = seen(n_records, plan=None)
        watcher.tick()
        if rolled:
            break
    events = watcher._watched.audit.read()
    attempts = [event for event in events if event["event"] == "attempt"]
    refused = [event for event in events if event["event"] == "kept"]
    assert rolled and len(attempts) <= 4 and n_records < 6000
    assert refused and all(event["needed"] >= 2000 for event in refused)
    assert all(later["fresh_records"] >= earlier["needed"] for earlier, later in zip(refused, attempts[1:]))


def test_records_that_a_test_refused_are_not_used_again_however_few_there_were_before(watcher: WatcherOfSights) -> None:
    def cannot(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
        require_enough_scenes(status, certify_after, run)
        refuse_by_losses(status, certify_after, run)

    watcher.training.does = cannot
    for n_records in range(900, 2000 * SCENE, 100):
        watcher.sight = seen(n_records, plan=None)
        watcher.tick()
        if decisions(watcher)[-1:] == [("kept", "the records cannot certify 2.00%")]:
            break
    watcher.sight = seen(n_records + 900, plan=None)
    assert watcher.trigger(watcher.sight) is None
    watcher.sight = seen(n_records + 1000, plan=None)
    trigger = watcher.trigger(watcher.sight)
    assert trigger is not None and trigger.fresh_after == START + n_records - 1


def test_an_attempt_without_enough_labels_waits_for_half_more_records_and_uses_all_of_them(
        watcher: WatcherOfSights) -> None:
    def lacks_labels(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
        raise TooFewRecordsError("0 of the 300 records of the certify part have a label")

    watcher.training.does = lacks_labels
    for n_records in (1000, 1100, 1499):
        watcher.sight = seen(n_records, plan=None)
        watcher.tick()
    assert watcher.training.asked == [999]
    trigger = watcher.trigger(seen(1500, plan=None))
    assert trigger is not None and trigger.evidence["fresh_records"] == 1500


def test_records_that_could_not_be_used_before_any_loss_was_known_can_still_certify(watcher: WatcherOfSights) -> None:
    def cannot_use(status: ModelStatus, certify_after: float, run: RunPaths) -> None:
        raise RecordError("the archive is executed by folded, but openvino made the records")

    watcher.training.does = cannot_use
    for n_records in (3000, 3100, 3993):
        watcher.sight = seen(n_records, plan=None)
        watcher.tick()
    assert watcher.training.asked == [2999], "it is not repeated at each look"
    trigger = watcher.trigger(seen(3994, plan=None))
    assert trigger is not None and trigger.evidence["fresh_records"] == 3994


def test_with_a_larger_tolerance_an_attempt_does_not_wait_for_the_records_of_the_smaller_one(
        watcher: WatcherOfSights) -> None:
    watcher.training.does = require_enough_scenes
    watcher.sight = seen(1000, plan=None)
    watcher.tick()
    assert watcher.trigger(watcher.sight) is None
    watcher._watched = replace(watcher._watched, terms=Terms(0.1, 0.05, 30 * 24 * 3600.0))
    assert watcher.trigger(watcher.sight) is not None
