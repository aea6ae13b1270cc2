"""When a plan is renewed, on which records, and when the new plan replaces the old one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from early_exit.archiver.audit import Audit
from early_exit.archiver.watch.lock import only_watcher
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.triggers import ATTEMPT, CLOCK, Terms, fired, fresh_after, is_better
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.errors import ServerError
from early_exit.handler.exits.head import HeadSpec
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor.sequential_test import Alarm, Evidence, MonitorState

DAY = 24 * 3600.0
NOW = 100 * DAY
TERMS = Terms(tolerance=0.02, delta=0.05, max_age_s=30 * DAY)
CERTIFICATE = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1500, 19, 0.0127, 0.03, "-", (80 * DAY, 90 * DAY))
EXIT = PlannedExit("1", HeadSpec(), ConfidencePolicy(1.0, 0.9), 0.4, 0.01)
PLAN = ExitPlan("ab", "certified", (EXIT,), CERTIFICATE, measure="seconds", batch_size=8, expected_cost=0.7)


@pytest.fixture(scope="module")
def backbone() -> BackboneDescription:
    torch.manual_seed(0)
    return Backbone.from_module(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)),
                                (4,)).description


def standing(backbone: BackboneDescription, n_old: int, n_new: int, *, plan: ExitPlan | None = PLAN,
             alarm_at: float | None = None, new_at: float = 95 * DAY) -> ModelStatus:
    times = torch.cat([torch.full((n_old,), 85 * DAY), torch.full((n_new,), new_at)]).double()
    state = MonitorState(1, Evidence(), (Alarm(0, alarm_at, 200, 0.06, 21.0),)) if alarm_at else MonitorState()
    return ModelStatus("model", "2.0", ("2.0",), Path("model-2.0.mar"), backbone, plan, "", (), times, (state,))


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return Audit(tmp_path / "audit.jsonl")


def reason(found: ModelStatus, audit: Audit, now: float = NOW) -> str | None:
    trigger = fired(found, audit, TERMS, now)
    return None if trigger is None else trigger.reason


def test_a_fifth_of_new_records_renews_once_they_can_certify(backbone: BackboneDescription, audit: Audit) -> None:
    assert TERMS.n_enough == 994, "twice 149 in the three tenths that certify"
    assert reason(standing(backbone, 4000, 999), audit) is None, "less than a fifth"
    assert reason(standing(backbone, 4000, 1000), audit) == "records"
    assert reason(standing(backbone, 100, 900), audit) is None, "nine tenths, but too few"


def test_an_alarm_renews_on_what_was_recorded_after_it(backbone: BackboneDescription, audit: Audit) -> None:
    assert reason(standing(backbone, 0, 1000, alarm_at=96 * DAY), audit) is None
    trigger = fired(standing(backbone, 9000, 1000, alarm_at=94 * DAY), audit, TERMS, NOW)
    assert trigger is not None and (trigger.reason, trigger.fresh_after) == ("alarm", 94 * DAY)
    assert trigger.evidence["alarms"][0][0]["mean_loss"] == 0.06


def test_later_alarms_do_not_put_a_renewal_off(backbone: BackboneDescription, audit: Audit) -> None:
    """Changed traffic raises alarms at the fallback levels too, while records for the renewal are being collected."""
    found = standing(backbone, 9000, 1000, alarm_at=94 * DAY)
    again = MonitorState(2, Evidence(), (*found.monitors[0].alarms, Alarm(1, 96 * DAY, 150, 0.07, 22.0)))
    found = replace(found, monitors=(again,))
    trigger = fired(found, audit, TERMS, NOW)
    assert trigger is not None and trigger.fresh_after == 94 * DAY
    audit.append(ATTEMPT, backbone=backbone.sha256, newest_record=95 * DAY)
    assert fresh_after(found, audit, NOW) == 96 * DAY, "the first since the plan could not be renewed"


def test_a_backbone_without_a_plan_and_an_old_certificate_renew(backbone: BackboneDescription, audit: Audit) -> None:
    assert reason(standing(backbone, 0, 1000, plan=None), audit) == "backbone"
    old = standing(backbone, 9000, 1000, new_at=121 * DAY)
    assert reason(old, audit, now=119 * DAY) is None
    assert reason(old, audit, now=121 * DAY) == "expired"


def test_other_traffic_than_the_plan_is_certified_for_renews(backbone: BackboneDescription, audit: Audit) -> None:
    plan = replace(PLAN, traffic="first")
    found = standing(backbone, 9000, 1000, plan=plan)
    assert reason(replace(found, traffic="first"), audit) is None
    trigger = fired(replace(found, traffic="second"), audit, TERMS, NOW)
    assert trigger is not None and trigger.reason == "traffic"
    assert (trigger.evidence["certified"], trigger.evidence["served"]) == ("first", "second")
    assert is_better(replace(plan, expected_cost=0.9), plan, "traffic", 0.7)[0], "nothing leaves by the current one"


def test_no_record_certifies_twice(backbone: BackboneDescription, audit: Audit) -> None:
    """Otherwise a plan that failed its test could pass it by being tested again and again."""
    found = standing(backbone, 100, 2000)
    audit.append(ATTEMPT, backbone=backbone.sha256, newest_record=95 * DAY)
    assert reason(found, audit) is None
    later = replace(found, times=torch.cat([found.times, torch.full((1000,), 97 * DAY).double()]))
    trigger = fired(later, audit, TERMS, NOW)
    assert trigger is not None and trigger.fresh_after == 95 * DAY


def test_a_clock_that_was_set_back_does_not_stop_the_loop(backbone: BackboneDescription, audit: Audit) -> None:
    found = standing(backbone, 1000, 1000)
    back = 50 * DAY
    assert fresh_after(found, audit, back) == back
    noticed = audit.append(CLOCK, ahead_until=90 * DAY)
    assert fresh_after(found, audit, back) == noticed["time"], "the time at which it was noticed"


def test_a_new_plan_must_be_certified_and_cheaper_or_safer() -> None:
    cheaper = replace(PLAN, expected_cost=0.6)
    assert is_better(cheaper, PLAN, "records", 0.61)[0]
    assert not is_better(cheaper, PLAN, "records", 0.59)[0], "what counts is what the current plan costs now"
    assert is_better(replace(PLAN, expected_cost=0.9), PLAN, "alarm", 0.7)[0], "safer than a void one"
    assert is_better(replace(PLAN, expected_cost=0.9), PLAN, "expired", 0.7)[0]
    assert is_better(PLAN, None, "backbone", None)[0]
    for refused, cost, why in ((replace(cheaper, certificate=None), 0.7, "no certificate"),
                               (replace(cheaper, exits=()), 0.7, "no exit"), (cheaper, None, "is not known")):
        better, found = is_better(refused, PLAN, "records", cost)
        assert not better and why in found


@given(lines=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3),
                      max_size=5), cut=st.integers(0, 30))
def test_an_audit_is_read_as_it_was_written_and_goes_on_after_a_crash(
        tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, object]], cut: int) -> None:
    audit = Audit(tmp_path_factory.mktemp("audit") / "audit.jsonl")
    written = [audit.append("noted", evidence=line) for line in lines]
    assert audit.read() == written
    with audit.path.open("ab") as file:
        file.write(b'{"time": 1, "event": "cut sh'[:cut])
    written.append(audit.append("afterwards"))
    assert audit.read()[-1] == written[-1]
    assert [event for event in audit.read() if event["event"] == "noted"] == written[:-1]


def test_decisions_are_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        Audit(tmp_path / "model" / "audit.jsonl").append("noted")
    finally:
        os.umask(umask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o700


def _hold(path: Path, ready: object) -> None:
    with only_watcher(path):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_a_second_watcher_is_refused_until_the_first_one_ends_however_it_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=_hold, args=(tmp_path / "lock", ready))
    first.start()
    assert ready.wait(10)
    with pytest.raises(ServerError, match=f"another ee-watch .process {first.pid}."), only_watcher(tmp_path / "lock"):
        pass
    os.kill(first.pid or 0, signal.SIGKILL)
    first.join()
    with only_watcher(tmp_path / "lock"):
        pass
