"""Decides when a plan is renewed, and whether the new plan is better than the old one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from early_exit.archiver.audit import Audit, Event
from early_exit.archiver.watch.status import ModelStatus
from early_exit.handler.errors import RecordError, TooFewRecordsError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.training.data.split import Part
from early_exit.training.selection.certify import records_needed

NEW_SHARE = 0.2
"""The share of new records at which the paper retrains (section 3.6)."""
LOST_STATE = "lost state"
"""The reason to renew a plan if a worker could not read its monitor's state, which may have held an alarm."""
ATTEMPT, KEPT, ROLLING = "attempt", "kept", "rolling"
CLOCK = "clock set back"
ALARM_CAME = "an alarm came meanwhile"
OTHER_CAME = "another version was brought in meanwhile"


@dataclass(frozen=True)
class Trigger:
    """The reason to renew a plan."""

    reason: str
    """One of 'alarm', 'lost state', 'backbone', 'traffic', 'expired' and 'records'."""
    fresh_after: float
    """Records up to this Unix time are not used to certify the new plan."""
    evidence: dict[str, Any]
    """The numbers and digests behind the reason, for the audit."""


@dataclass(frozen=True)
class Terms:
    """The terms by which triggers are judged."""

    tolerance: float
    """The largest expected loss for which a new plan is certified."""
    delta: float
    """The largest probability that a certificate is wrong."""
    max_age_s: float
    """The age of a certificate's newest record, in seconds, at which the certificate is renewed."""

    @property
    def n_enough(self) -> int:
        """The number of fresh records with which a new plan can be certified even if some answers differ."""
        return math.ceil(2 * records_needed(self.tolerance, self.delta) / Part.CERTIFY.share)


@dataclass(frozen=True)
class Wanted:
    """The records with which the next attempt begins."""

    n: int
    """The number of records."""
    newer_than: float
    """The Unix time in seconds after which they were made."""


def fired(status: ModelStatus, audit: Audit, terms: Terms, now: float) -> Trigger | None:
    """Return the reason to renew the plan now; None if there is none, or too few fresh records to certify a plan."""
    plan = status.plan
    since = fresh_after(status, audit, now)
    n_new, n_total = status.n_newer(since), len(status.times)
    wanted = wanted_records(status, audit, terms, now)
    if status.n_newer(wanted.newer_than) < wanted.n:
        return None
    evidence = {"records": n_total, "fresh_records": n_new, "backbone": status.backbone.sha256,
                "plan": plan.digest() if plan else None}
    if status.first_alarm is not None:
        alarms = [[alarm.__dict__ for alarm in state.alarms] for state in status.monitors]
        return Trigger(LOST_STATE if status.is_state_lost else "alarm", since, {**evidence, "alarms": alarms})
    if plan is None:
        return Trigger("backbone", since, evidence)
    if plan.certificate is not None and not plan.is_certified_for(status.traffic):
        return Trigger("traffic", since, {**evidence, "certified": plan.traffic, "served": status.traffic})
    if plan.certificate is not None and now - plan.certificate.window[1] > terms.max_age_s:
        return Trigger("expired", since, {**evidence, "age_s": now - plan.certificate.window[1]})
    if n_new >= NEW_SHARE * n_total:
        return Trigger("records", since, evidence)
    return None


def wanted_records(status: ModelStatus, audit: Audit, terms: Terms, now: float) -> Wanted:
    """Return the records with which the next attempt begins.

    These are `terms.n_enough` fresh records. They are more after an attempt for which there were too few records,
    because traffic in scenes has fewer pieces of evidence than records; and they are newer than those of an attempt
    whose records could not be used.
    """
    since = fresh_after(status, audit, now)
    last = audit.latest(ATTEMPT, KEPT, ROLLING)
    if last is None or last.get("needed_for") != _conditions(status, terms):
        return Wanted(terms.n_enough, since)
    return Wanted(max(terms.n_enough, int(last["needed"])), max(since, last.get("newer_than", since)))


def refusal(error: RecordError, status: ModelStatus, terms: Terms, attempt: Event, now: float) -> dict[str, Any]:
    """Return what the audit notes of an attempt that failed before it looked at any loss.

    If there were too few records or labels, the next attempt waits for as many records as the error asks for, and at
    least for half more than there are: the number is an estimate, and labels have no number of records. If the records
    could not be used for another reason, more of them may not help, and the wait only keeps an attempt from being
    repeated at each look. It is then a wait for enough records that are all new, which ends even if a limit on the age
    or the size of the records keeps their number as it is.

    Args:
        error: the reason.
        status: the model at the attempt.
        terms: the terms of the watch.
        attempt: the attempt.
        now: the Unix time.
    """
    told = {"why": str(error), "needed_for": _conditions(status, terms)}
    if isinstance(error, TooFewRecordsError):
        half_more = math.ceil(1.5 * status.n_newer(attempt["certify_after"]))
        return {**told, "needed": max(error.needed or 0, half_more)}
    # Records of a clock that was ahead seem to be newer than any record of the next hours.
    newer_than = min(attempt["newest_record"], now)
    n_ahead = status.n_newer(newer_than) - status.n_newer(attempt["newest_record"])
    return {**told, "needed": terms.n_enough + n_ahead, "newer_than": newer_than}


def _conditions(status: ModelStatus, terms: Terms) -> dict[str, Any]:
    """Return what the number of records that an attempt needs depends on."""
    return {"backbone": status.backbone.sha256, "traffic": status.traffic, "tolerance": terms.tolerance,
            "delta": terms.delta}


def fresh_after(status: ModelStatus, audit: Audit, now: float) -> float:
    """Return the Unix time after which records are fresh: no plan was certified or refused on later records.

    If a clock was ahead while records were made, all later records would look old. In that case, records are fresh if
    they were made after a watcher noticed that.
    """
    since = newest_mark(status, audit)
    if since <= now:
        return since
    noticed = audit.latest(CLOCK)
    return noticed["time"] if noticed and noticed["ahead_until"] == since else now


def newest_mark(status: ModelStatus, audit: Audit) -> float:
    """Return the Unix time of the newest record on which a plan was certified or refused, or of the first later alarm.

    An attempt that failed before it looked at any loss, such as one for which there were too few records, does not
    count: its records can still certify a plan.

    Later alarms are ignored. Changed traffic makes one fallback level after the other raise an alarm, and each of these
    alarms would delay the renewal. The fresh records may have led to the later alarms, which does no harm: those alarms
    only show that the served plan is even worse.
    """
    plan = status.plan
    marks = [0.0]
    if plan is not None and plan.certificate is not None:
        marks.append(plan.certificate.window[1])
    marks += [attempt["newest_record"] for attempt in _that_may_have_tested(audit.read())
              if attempt["backbone"] == status.backbone.sha256]
    mark = max(marks)
    return float(next((alarm for alarm in status.alarm_times if alarm > mark), mark))


def _that_may_have_tested(events: Sequence[Event]) -> list[Event]:
    """Return the tries of attempts, without those of attempts that failed before they looked at any loss."""
    tries: list[Event] = []
    n_over = 0  # the first ones, whose attempt is over
    for event in events:
        if event["event"] == ATTEMPT:
            if tries and tries[-1].get("run") != event.get("run"):
                n_over = len(tries)
            tries.append(event)
        elif event["event"] in (KEPT, ROLLING):
            if "needed" in event:
                del tries[n_over:]
            n_over = len(tries)
    return tries


def is_better(new: ExitPlan, current: ExitPlan | None, reason: str, current_cost: float | None) -> tuple[bool, str]:
    """Tell whether a renewed plan is to replace the current one, and why.

    Args:
        new: the plan as it was trained.
        current: the plan that serves, if there is one.
        reason: why the plan was renewed, the `reason` of its trigger.
        current_cost: the cost of `current`, on the records and by the measurements of `new`; None if it is not known.
    """
    if new.certificate is None:
        return False, "it has no certificate"
    if not new.exits:
        return False, "no exit pays within the tolerance"
    if reason == LOST_STATE:
        return True, "it is certified, and it is not known whether the current plan is: its monitor's state is lost"
    if reason in ("alarm", "traffic", "expired"):
        return True, f"it is certified, and the current plan no longer is ({reason})"
    if current is None or not current.exits:
        return True, "it is certified, and no request leaves early now"
    if current_cost is None:
        return False, "the cost of the current plan is not known: the new records lack one of its layers"
    if new.expected_cost >= current_cost:
        return False, f"on the new records it costs {new.expected_cost:.3f}, and the current plan {current_cost:.3f}"
    return True, f"it is certified and costs {new.expected_cost:.3f} instead of {current_cost:.3f} on the new records"


def came_meanwhile(now: ModelStatus, replaces: str, attempt: Event | None) -> str | None:
    """Return why a plan is not rolled in although it is better; None if nothing has changed since its training began.

    Args:
        now: the model now.
        replaces: the version that the plan was made for. If another one serves, the operator has brought it in, perhaps
            with another backbone, and the plan must not replace it.
        attempt: the attempt that trained the plan; None if the audit has none.
    """
    if now.version != replaces:
        return OTHER_CAME
    return ALARM_CAME if attempt is not None and has_new_alarm(now, attempt) else None


def has_new_alarm(status: ModelStatus, attempt: Event) -> bool:
    """Tell whether there is an alarm that was not known when the training of an attempt began.

    The alarm voids the certificate of the attempt, whose records may be of the traffic before it.
    """
    if (known := attempt.get("known_alarms")) is None:  # version 0.2.0 did not note them
        return status.has_alarm_after(attempt["newest_record"])
    return not set(status.alarm_names) <= {*known}


def summary(plan: ExitPlan | None) -> dict[str, Any] | None:
    """Return the summary of a plan for the audit."""
    if plan is None:
        return None
    certificate = plan.certificate
    return {"plan": plan.digest(), "exits": [planned.layer for planned in plan.exits], "measure": plan.measure,
            "expected_cost": plan.expected_cost,
            "certificate": None if certificate is None else {
                "risk": certificate.risk, "bound": certificate.tolerance, "confidence": certificate.confidence,
                "n": certificate.n, "k": certificate.k, "p_value": certificate.p_value}}
