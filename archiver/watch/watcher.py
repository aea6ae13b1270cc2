"""Keeps one model right: renews its plan when there is reason to, tries the new one out, and takes it back."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from early_exit.archiver.audit import AUDIT_FILE, Audit, Event
from early_exit.archiver.control import ModelServer
from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.roll import retire
from early_exit.archiver.watch.status import ModelStatus, look
from early_exit.archiver.watch.triggers import ATTEMPT, CLOCK, Terms, Trigger, fired, is_better, newest_mark
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.errors import EarlyExitError, RecordError, ServerError
from early_exit.handler.exits.plan import ExitPlan, build_heads, load_plan
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.planning.reassess import cost_on_run

_TRIES = 3
ROLLING, ROLLED, ROLL_FAILED = "rolling", "rolled", "roll failed"
ACCEPTED, TAKING_BACK, ROLLED_BACK = "accepted", "taking back", "rolled back"
KEPT, TROUBLE = "kept", "trouble"


@dataclass(frozen=True)
class Watched:
    """What is watched, and how."""

    model: str
    servers: Sequence[ModelServer]
    store: Path
    """The servers' model store."""
    sources: Sequence[str]
    """Folders and URLs with the servers' records."""
    state: Path
    """Folder for the audit, runs and copies of records from URLs."""
    options: Callable[[ArchiveLayout], TrainingOptions]
    """Returns what to train for an extracted archive."""
    labels: Path | None
    """CSV of request ids and true classes, for the risk of accuracy."""
    terms: Terms
    trial_samples: int
    """Shadow samples that a new version must pass before it is accepted."""
    longest_batch_s: float
    """How long an old version may take for one batch."""

    @property
    def audit(self) -> Audit:
        return Audit(self.state / AUDIT_FILE)


class Watcher:
    """Looks, decides and acts; all it knows lies in the audit, so it goes on where a killed one was."""

    def __init__(self, watched: Watched, log: Callable[[str], None] = lambda line: None) -> None:
        self._watched, self._log = watched, log
        self._audit = watched.audit
        self._trouble: str | None = None

    def tick(self) -> None:
        """Look once and do what is to be done; trouble is noted in the audit, once while it lasts."""
        try:
            self._tick()
            self._trouble = None
        except Exception as error:  # one bad tick must not end the watch
            trouble = f"{type(error).__name__}: {error}"
            if trouble != self._trouble:
                with contextlib.suppress(OSError):  # the trouble may be the disk of the audit
                    self._note(TROUBLE, error=trouble)
            self._trouble = trouble

    def look(self) -> ModelStatus:
        watched = self._watched
        return look(watched.servers[0], watched.model, watched.store, watched.sources, watched.state / "remote")

    def trigger(self, status: ModelStatus) -> Trigger | None:
        """Return why the plan is to be renewed; nothing while a new version is on trial or taken back."""
        if self.on_trial(status) is not None or self._taken_back_in_part() is not None:
            return None
        return fired(status, self._audit, self._watched.terms, time.time())

    def on_trial(self, status: ModelStatus) -> Event | None:
        """Return the decision that brought the served version in, while it is not accepted yet."""
        event = self._audit.latest(ROLLING, ROLLED, ACCEPTED, TAKING_BACK, ROLLED_BACK)
        if event is None or event["event"] not in (ROLLING, ROLLED) or event["version"] != status.version:
            return None
        return event

    def _tick(self) -> None:
        status = self.look()
        self._note_clock(status)
        if (begun := self._taken_back_in_part()) is not None:
            self._take_back(begun)
        elif (trial := self.on_trial(status)) is not None:
            if trial["event"] == ROLLING:
                self._finish(trial)
            self._judge(status, trial)
        elif (pending := self._pending(status)) is not None:
            self._roll(pending)
        elif (attempt := self._attempt(status)) is not None:
            self._require_agreement(status)
            self._renew(status, attempt)

    def _note_clock(self, status: ModelStatus) -> None:
        mark, noticed = newest_mark(status, self._audit), self._audit.latest(CLOCK)
        if mark > time.time() and (noticed is None or noticed["ahead_until"] != mark):
            self._note(CLOCK, ahead_until=mark)

    def _finish(self, trial: Event) -> None:
        """Complete a roll that was cut short after the first switch."""
        self._replace(trial["replaces"], trial["version"], trial["archive"])
        self._note(ROLLED, **{key: value for key, value in trial.items() if key not in ("time", "event")})

    def _taken_back_in_part(self) -> Event | None:
        """Return the decision to take a version back that was not carried out to the end."""
        event = self._audit.latest(ROLLING, TAKING_BACK, ROLLED_BACK)
        return event if event is not None and event["event"] == TAKING_BACK else None

    def _take_back(self, begun: Event) -> None:
        self._replace(begun["version"], begun["to"], begun["archive"])
        self._note(ROLLED_BACK, version=begun["version"], version_now=begun["to"])

    def _replace(self, version: str, by: str, archive: str) -> None:
        """Let every server that serves a version serve another, whatever a roll that was cut short left there."""
        for server in self._watched.servers:
            versions = server.versions(self._watched.model)
            serves = next((registered.version for registered in versions if registered.is_default), None)
            if serves == by:
                self._retire(server, version)
            elif serves == version:
                self._retire(server, by)
                roll_all([server], self._watched.store / archive, longest_batch_s=self._watched.longest_batch_s,
                         log=self._log)
            else:  # somebody else decided
                self._log(f"{server} serves {serves}, neither {version} nor {by}, and is left so")

    def _retire(self, server: ModelServer, version: str) -> None:
        """Remove a version that gets no new requests, unless it is not there."""
        for registered in server.versions(self._watched.model):
            if registered.version == version and not registered.is_default:
                retire(server, self._watched.model, registered, longest_batch_s=self._watched.longest_batch_s)

    def _require_agreement(self, status: ModelStatus) -> None:
        """Check that all servers serve the version that is looked at: one that was restarted may not.

        Raises:
            ServerError: one serves another.
        """
        for server in self._watched.servers:
            if not any(registered.version == status.version and registered.is_default
                       for registered in server.versions(status.model)):
                raise ServerError(f"{server} does not serve {status.model} {status.version} as "
                                  f"{self._watched.servers[0]} does: bring one version into all of them with ee-roll")

    def _judge(self, status: ModelStatus, trial: Event) -> None:
        """Accept a new version, take it back, or let it go on."""
        evidence = {"version": status.version, "samples": status.n_watched,
                    "plan": status.plan.digest() if status.plan else None}
        if status.first_alarm is not None:
            alarms = [alarm.__dict__ for state in status.monitors for alarm in state.alarms]
            begun = {**evidence, "alarms": alarms, "to": trial["replaces"], "archive": trial["replaced_archive"]}
            self._note(TAKING_BACK, **begun)
            self._take_back(begun)
        elif status.n_watched >= self._watched.trial_samples:
            self._note(ACCEPTED, **evidence)

    def _pending(self, status: ModelStatus) -> Event | None:
        """Return a roll that failed or was cut short before the switch and is worth another try."""
        event = self._audit.latest(ROLLING, ROLLED, ROLL_FAILED)
        if event is None or event["event"] == ROLLED or event["replaces"] != status.version:
            return None
        if event["tries"] >= _TRIES:
            return None
        for server in self._watched.servers:  # what was left half done
            self._retire(server, event["version"])
        return event

    def _attempt(self, status: ModelStatus) -> Event | None:
        """Return the renewal that was cut short, or a new one that there is reason for."""
        event = self._audit.latest(ATTEMPT, KEPT, ROLLING)
        if (event is not None and event["event"] == ATTEMPT and event["version"] == status.version
                and event.get("tries", _TRIES) < _TRIES):  # audits of before do not count them
            return {key: value for key, value in event.items() if key not in ("time", "event")}
        if (trigger := self.trigger(status)) is None:
            return None
        return {
            "reason": trigger.reason, **trigger.evidence, "version": status.version,
            "run": time.strftime("%Y%m%d-%H%M%S", time.gmtime()), "newest_record": status.times[-1].item(),
            "certify_after": trigger.fresh_after, "tries": 0}

    def _renew(self, status: ModelStatus, attempt: Event) -> None:
        run = RunPaths(self._watched.state / "runs" / attempt["run"])
        self._note(ATTEMPT, **{**attempt, "tries": attempt["tries"] + 1})
        try:
            plan, current_cost = self._train(status, attempt["certify_after"], run)
        except RecordError as error:
            self._keep(status, run, why=str(error))
            return
        better, why = is_better(plan, status.plan, attempt["reason"], current_cost)
        evidence = {"why": why, "run": run.root.name, "new": _summary(plan), "current": _summary(status.plan),
                    "current_cost_now": current_cost}
        if not better:
            self._keep(status, run, **evidence)
            return
        mar = build_archive(ArchiveRequest(str(status.archive), self._watched.store, plan=run.plan,
                                           version=self._next_version(status)), self._log)
        version = mar.stem.removeprefix(f"{status.model}-")
        _remove_training_set(run)
        self._roll({"version": version, "archive": mar.name, "replaces": status.version,
                    "replaced_archive": status.archive.name, "tries": 0, **evidence})

    def _keep(self, status: ModelStatus, run: RunPaths, **evidence: Any) -> None:
        self._note(KEPT, version=status.version, **evidence)
        _remove_training_set(run)

    def _train(self, status: ModelStatus, certify_after: float, run: RunPaths) -> tuple[ExitPlan, float | None]:
        """Train a new plan; return it and what the current one costs on its records."""
        with tempfile.TemporaryDirectory() as scratch:
            layout = ArchiveLayout(Path(scratch))
            extract(status.archive, layout.root)
            options = replace(self._watched.options(layout), fresh_after=certify_after)
            train(status.model, layout, list(status.shards), options, run, mar=status.archive,
                  labels=self._watched.labels, log=self._log)
            current_cost = None
            if layout.plan.exists():
                current, tensors = load_plan(layout.plan)
                heads = build_heads(current, tensors, status.backbone)
                current_cost = cost_on_run(current, heads, run, status.backbone, options)
        return load_plan(run.plan)[0], current_cost

    def _roll(self, decision: Event) -> None:
        facts = {key: decision[key] for key in ("version", "archive", "replaces", "replaced_archive", "why", "new",
                                                "current", "current_cost_now")}
        facts["tries"] = decision["tries"] + 1
        self._note(ROLLING, **facts)
        try:
            roll_all(self._watched.servers, self._watched.store / decision["archive"], put_back=True,
                     longest_batch_s=self._watched.longest_batch_s, log=self._log)
        except EarlyExitError as error:
            self._note(ROLL_FAILED, **facts, error=str(error))
            return
        self._note(ROLLED, **facts)

    def _next_version(self, status: ModelStatus) -> str:
        """Return a version above all that the server has and the store holds: none of them is replaced."""
        stored = (mar.stem.removeprefix(f"{status.model}-") for mar in self._watched.store.glob("*.mar"))
        numbers = [float(version) for version in (*stored, *status.registered) if _is_number(version)]
        return f"{int(max(numbers, default=0)) + 1}.0"

    def _note(self, event: str, **evidence: Any) -> None:
        about = ", ".join(f"{key} {value}" for key, value in evidence.items() if not isinstance(value, (dict, list)))
        self._log(f"{event}: {about}")
        self._audit.append(event, **evidence)


def _remove_training_set(run: RunPaths) -> None:
    """Remove a decided run's copy of the records: they would outlive their own age and size limits there."""
    shutil.rmtree(run.training_set.root, ignore_errors=True)
    shutil.rmtree(run.remote, ignore_errors=True)


def _summary(plan: ExitPlan | None) -> dict[str, Any] | None:
    """Return what the audit keeps of a plan."""
    if plan is None:
        return None
    certificate = plan.certificate
    return {"plan": plan.digest(), "exits": [planned.layer for planned in plan.exits], "measure": plan.measure,
            "expected_cost": plan.expected_cost,
            "certificate": None if certificate is None else {
                "risk": certificate.risk, "bound": certificate.tolerance, "confidence": certificate.confidence,
                "n": certificate.n, "k": certificate.k, "p_value": certificate.p_value}}


def _is_number(version: str) -> bool:
    return version.replace(".", "", 1).isdecimal() and math.isfinite(float(version))
