"""When a plan is to be renewed, and when the new one is better than the old one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from early_exit.archiver.watch.audit import Audit
from early_exit.archiver.watch.status import ModelStatus
from early_exit.handler.exits.plan import ExitPlan
from early_exit.training.data.dataset import Part
from early_exit.training.selection.certify import records_needed

NEW_SHARE = 0.2
"""Share of new records at which the paper retrains (section 3.6)."""
ATTEMPT = "attempt"
CLOCK = "clock set back"


@dataclass(frozen=True)
class Trigger:
    """Why a plan is to be renewed."""

    reason: str
    """'alarm', 'backbone', 'expired' or 'records'."""
    fresh_after: float
    """Records up to this Unix time are not used to certify the new plan."""
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Terms:
    """What triggers are judged by."""

    tolerance: float
    delta: float
    max_age_s: float

    @property
    def n_enough(self) -> int:
        """Fresh records with which a new plan can be certified even if some answers differ."""
        return math.ceil(2 * records_needed(self.tolerance, self.delta) / Part.CERTIFY.share)


def fired(standing: ModelStatus, audit: Audit, terms: Terms, now: float) -> Trigger | None:
    """Return why the plan is to be renewed now, if it is; never with fewer fresh records than can certify one."""
    plan = standing.plan
    since = fresh_after(standing, audit, now)
    n_new, n_total = standing.n_newer(since), len(standing.times)
    if n_new < terms.n_enough:
        return None
    evidence = {"records": n_total, "fresh_records": n_new, "backbone": standing.backbone.sha256,
                "plan": plan.digest() if plan else None}
    if standing.first_alarm is not None:
        alarms = [[alarm.__dict__ for alarm in state.alarms] for state in standing.monitors]
        return Trigger("alarm", since, {**evidence, "alarms": alarms})
    if plan is None:
        return Trigger("backbone", since, evidence)
    if plan.certificate is not None and now - plan.certificate.window[1] > terms.max_age_s:
        return Trigger("expired", since, {**evidence, "age_s": now - plan.certificate.window[1]})
    if n_new >= NEW_SHARE * n_total:
        return Trigger("records", since, evidence)
    return None


def fresh_after(standing: ModelStatus, audit: Audit, now: float) -> float:
    """Return the Unix time after which records are fresh: no plan was certified, or refused, on any later one.

    A clock that was ahead when they were recorded would make all that comes later look old: then what is recorded
    after a watcher noticed this is fresh.
    """
    since = newest_mark(standing, audit)
    if since <= now:
        return since
    noticed = audit.latest(CLOCK)
    return noticed["time"] if noticed and noticed["ahead_until"] == since else now


def newest_mark(standing: ModelStatus, audit: Audit) -> float:
    """Return the Unix time of the newest record that a plan was certified or refused on, or of the first alarm since.

    The first, because traffic that has changed makes the safer settings alarm too, one after the other, and each
    would put the renewal off. Counting from the first keeps the fresh records free of what the later alarms saw: they
    only say that the served plan is worse still.
    """
    plan = standing.plan
    marks = [0.0]
    if plan is not None and plan.certificate is not None:
        marks.append(plan.certificate.window[1])
    marks += [event["newest_record"] for event in audit.read()
              if event["event"] == ATTEMPT and event["backbone"] == standing.backbone.sha256]
    mark = max(marks)
    return float(next((alarm for alarm in standing.alarm_times if alarm > mark), mark))


def is_better(new: ExitPlan, current: ExitPlan | None, reason: str, current_cost: float | None) -> tuple[bool, str]:
    """Tell whether a renewed plan is to replace the current one, and why.

    Args:
        new: as it was trained.
        current: that serves.
        reason: of the renewal.
        current_cost: what `current` costs on the records and by the clock that `new` was made with, if these tell.
    """
    if new.certificate is None:
        return False, "it has no certificate"
    if not new.exits:
        return False, "no exit pays within the tolerance"
    if reason in ("alarm", "expired"):
        return True, f"it is certified, and the current plan is not any more ({reason})"
    if current is None or not current.exits:
        return True, "it is certified, and nothing exits now"
    if current_cost is None:
        return False, "the new records do not tell what the current plan costs: they lack one of its layers"
    if new.expected_cost >= current_cost:
        return False, f"on the new records it costs {new.expected_cost:.3f}, the current plan {current_cost:.3f}"
    return True, f"it is certified and costs {new.expected_cost:.3f} instead of {current_cost:.3f} on the new records"
