"""Watches one model: renews its plan when there is reason to, tries the new version out, and takes a bad one back."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

from early_exit.archiver.audit import Event
from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.retiring import require_known_batch
from early_exit.archiver.watch.left_over import limit_records, remove_left_over, run_name, too_little_room
from early_exit.archiver.watch.retraining import train_anew
from early_exit.archiver.watch.served import finish_roll, remove_version, require_agreement, take_back
from early_exit.archiver.watch.status import ModelStatus, look
from early_exit.archiver.watch.trial import failure, has_passed, require_watched, why_unseen, why_unwatched
from early_exit.archiver.watch.triggers import (
    ALARM_CAME,
    ATTEMPT,
    CLOCK,
    KEPT,
    ROLLING,
    Trigger,
    came_meanwhile,
    fired,
    has_new_alarm,
    is_better,
    newest_mark,
    refusal,
    summary,
    wanted_records,
)
from early_exit.archiver.watch.versions import next_version, stored_versions
from early_exit.archiver.watch.watched import Watched
from early_exit.handler.errors import EarlyExitError, RecordError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.files.names import bare_name
from early_exit.training.data.sources import each_once
from early_exit.training.paths import RunPaths

_TRIES = 3
ROLLED, ROLL_FAILED, GIVEN_UP = "rolled", "roll failed", "given up"
ACCEPTED, TAKING_BACK, ROLLED_BACK = "accepted", "taking back", "rolled back"
TROUBLE = "trouble"


class Watcher:
    """Looks, decides and acts. Its whole state is in the audit, so it continues where a killed watcher stopped."""

    def __init__(self, watched: Watched, log: Callable[[str], None] = lambda line: None) -> None:
        self._watched, self._log, self._audit = watched, log, watched.audit
        self._trouble: str | None = None
        self._seen: ModelStatus | None = None
        self._told = set[str]()

    def tick(self) -> None:
        """Look once and act; trouble is noted in the audit, once for as long as it lasts.

        In any case, the files of renewals that are over are removed, and records that are too old or too many.
        """
        try:
            try:
                self._tick()
            finally:
                self._clean_up()
            self._trouble = None
        except Exception as error:  # one bad tick must not end the watch
            trouble = f"{type(error).__name__}: {error}"
            if trouble != self._trouble:
                with contextlib.suppress(OSError):  # the trouble may be the disk of the audit
                    self._note(TROUBLE, error=trouble)
            self._trouble = trouble

    def look(self) -> ModelStatus:
        watched = self._watched
        return look(watched.servers[0], watched.model, watched.store, watched.sources, watched.state / "remote",
                    self._tell_once)

    def obstacle(self, status: ModelStatus) -> str | None:
        """Return why there can be no renewal, however many requests come; None if nothing is in its way."""
        if (why := why_unwatched(status.config)) is not None:
            return f"no monitor would watch a new plan: {why}"
        wanted = wanted_records(status, self._audit, self._watched.terms, time.time())
        return why_unseen(status) or too_little_room(status, wanted.n, len(each_once(self._watched.sources)))

    def _tell_once(self, line: str, about: str | None = None) -> None:
        said = about or line.lstrip("0123456789")  # apart from the number of records, which grows
        if said not in self._told:
            self._told.add(said)
            self._log(line)

    def trigger(self, status: ModelStatus) -> Trigger | None:
        """Return the reason to renew the plan, if there is one.

        There is none while a new version is on trial or being taken back, and none after an alarm until a newer record
        shows the traffic since then.
        """
        if self.on_trial(status) is not None or self._taken_back_in_part() is not None:
            return None
        if len(status.times) and status.has_alarm_after(status.times[-1].item()):
            return None
        return fired(status, self._audit, self._watched.terms, time.time())

    def on_trial(self, status: ModelStatus) -> Event | None:
        """Return the decision that brought the served version in, if the version is not accepted yet."""
        event = self._audit.latest(ROLLING, ROLLED, ACCEPTED, TAKING_BACK, ROLLED_BACK, GIVEN_UP)
        if event is None or event["event"] not in (ROLLING, ROLLED) or event["version"] != status.version:
            return None
        return event

    def _tick(self) -> None:
        status = self._seen = self.look()
        self._note_clock(status)
        if (begun := self._taken_back_in_part()) is not None:
            self._take_back(begun)
        elif (trial := self.on_trial(status)) is not None:
            self._judge(status, trial)
        elif (pending := self._pending(status)) is not None:
            self._roll(self._note_roll(pending))
        elif (attempt := self._attempt(status)) is not None:
            require_watched(status)
            require_agreement(self._watched, status.version)
            for server in self._watched.servers:  # checked before the training, which takes minutes
                require_known_batch(server, self._watched.longest_batch_s)
            self._renew(status, attempt)
        elif (obstacle := self.obstacle(status)) is not None:
            self._tell_once(obstacle, about=re.sub(r"\d+", "", obstacle))  # the same one with other numbers is not news

    def _note_clock(self, status: ModelStatus) -> None:
        mark, noticed = newest_mark(status, self._audit), self._audit.latest(CLOCK)
        if mark > time.time() and (noticed is None or noticed["ahead_until"] != mark):
            self._note(CLOCK, ahead_until=mark)

    def _finish(self, trial: Event) -> None:
        """Complete a roll that was interrupted after the first switch."""
        finish_roll(self._watched, trial["replaces"], trial["version"], trial["archive"], self._log)
        self._note(ROLLED, **{key: value for key, value in trial.items() if key not in ("time", "event")})

    def _taken_back_in_part(self) -> Event | None:
        """Return the decision to take a version back, if it was not carried out to the end."""
        event = self._audit.latest(ROLLING, TAKING_BACK, ROLLED_BACK)
        return event if event is not None and event["event"] == TAKING_BACK else None

    def _take_back(self, begun: Event) -> None:
        take_back(self._watched, begun["version"], begun["to"], begun["archive"], self._log)
        self._note(ROLLED_BACK, version=begun["version"], version_now=begun["to"])

    def _judge(self, status: ModelStatus, trial: Event) -> None:
        """Accept a new version, take it back, or let its trial continue.

        A roll that was interrupted is finished first, but not before an alarm: what keeps it from being finished, such
        as an old version that still gets requests, must not keep a bad version in service.
        """
        evidence = {"version": status.version, "samples": status.n_watched,
                    "plan": status.plan.digest() if status.plan else None}
        if (why := failure(status)) is not None:
            alarms = [alarm.__dict__ for state in status.monitors for alarm in state.alarms]
            begun = {**evidence, "why": why, "alarms": alarms, "to": trial["replaces"],
                     "archive": trial["replaced_archive"]}
            self._note(TAKING_BACK, **begun)
            self._take_back(begun)
            return
        if trial["event"] == ROLLING:
            self._finish(trial)
        if has_passed(status, self._watched.trial_samples):
            self._note(ACCEPTED, **evidence, tested=status.n_tested)

    def _pending(self, status: ModelStatus) -> Event | None:
        """Return a roll that failed or was interrupted before the switch, if it gets another try; else, give it up."""
        event = self._audit.latest(ROLLING, ROLLED, ROLL_FAILED, GIVEN_UP, ROLLED_BACK)
        if event is None or event["event"] not in (ROLLING, ROLL_FAILED):
            return None
        attempt = self._audit.latest(ATTEMPT)
        obsolete = came_meanwhile(status, event["replaces"], attempt)
        if obsolete or event["tries"] >= _TRIES:
            self._give_up(event, **({"why": obsolete} if obsolete else {}))
            return None
        self._undo(event)
        return event

    def _give_up(self, rolled: Event, **reason: str) -> None:
        """Remove a version that could not be rolled in from all servers, and then its archive from the store."""
        self._undo(rolled)
        if not any(registered.version == rolled["version"] for server in self._watched.servers
                   for registered in server.versions(self._watched.model)):
            (self._watched.store / bare_name(rolled["archive"], "an archive in the audit")).unlink(missing_ok=True)
        self._note(GIVEN_UP, **{key: rolled[key] for key in ("version", "archive", "replaces", "tries")}, **reason)

    def _undo(self, rolled: Event) -> None:
        """Remove what a failed try has left on servers; one that serves the version gets the one from before again.

        Raises:
            ServerError: a server still has the version. Then the roll is neither tried again nor given up: a version
                that is given up serves nowhere.
        """
        version = rolled["version"]
        take_back(self._watched, version, rolled["replaces"], rolled["replaced_archive"], self._log)
        for server in self._watched.servers:
            remove_version(self._watched, server, version)

    def _attempt(self, status: ModelStatus) -> Event | None:
        """Return the renewal that was interrupted, or a new one if there is a reason."""
        event = self._audit.latest(ATTEMPT, KEPT, ROLLING)
        if (event is not None and event["event"] == ATTEMPT and event["version"] == status.version
                and event.get("tries", _TRIES) < _TRIES):  # older audits do not count tries
            if not has_new_alarm(status, event):
                return {key: value for key, value in event.items() if key not in ("time", "event")}
            self._note(KEPT, version=status.version, run=event["run"], why=ALARM_CAME)
        if (trigger := self.trigger(status)) is None:
            return None
        return {
            "reason": trigger.reason, **trigger.evidence, "version": status.version,
            "run": run_name(), "newest_record": status.times[-1].item(),
            "known_alarms": status.alarm_names, "certify_after": trigger.fresh_after, "tries": 0}

    def _renew(self, status: ModelStatus, attempt: Event) -> None:
        run = RunPaths(self._watched.state / "runs" / attempt["run"])
        attempt = {**attempt, "tries": attempt["tries"] + 1}
        if len(status.times) and not run.inputs.exists():  # the training will take all records of today
            attempt["newest_record"] = status.times[-1].item()
        self._note(ATTEMPT, **attempt)
        try:
            plan, current_cost = self._train(status, attempt["certify_after"], run)
        except RecordError as error:
            # No loss of a record that certifies is known before the predictions: these records can still certify.
            refused = {"why": str(error)} if run.predictions.exists() else refusal(
                error, status, self._watched.terms, attempt, time.time())
            self._note(KEPT, version=status.version, run=run.root.name, **refused)
            return
        better, why = is_better(plan, status.plan, attempt["reason"], current_cost)
        evidence = {"why": why, "run": run.root.name, "new": summary(plan), "current": summary(status.plan),
                    "current_cost_now": current_cost}
        if not better:
            self._note(KEPT, version=status.version, **evidence)
            return
        version = next_version(self._watched.store, status.model, status.registered)
        mar = build_archive(ArchiveRequest(str(status.archive), self._watched.store, plan=run.plan, version=version),
                            self._log)
        try:
            # Training and packing take minutes.
            obsolete = came_meanwhile(self.look(), status.version, attempt)
            facts = None if obsolete else self._note_roll(
                {"version": version, "archive": mar.name, "replaces": status.version,
                 "replaced_archive": status.archive.name, "tries": 0, **evidence})
        except (OSError, EarlyExitError):  # without the note, the archive would belong to no roll
            mar.unlink()
            raise
        if facts is None:
            mar.unlink(missing_ok=True)
            self._note(KEPT, version=status.version, **{**evidence, "why": obsolete})
            return
        self._roll(facts)

    def _train(self, status: ModelStatus, certify_after: float, run: RunPaths) -> tuple[ExitPlan, float | None]:
        return train_anew(self._watched, status, certify_after, run, self._log)

    def _note_roll(self, decision: Event) -> Event:
        """Note that a version is being rolled in, for the first time or again; return the facts about the roll."""
        facts = {key: decision[key] for key in ("version", "archive", "replaces", "replaced_archive", "why", "new",
                                                "current", "current_cost_now")}
        facts["tries"] = decision["tries"] + 1
        self._note(ROLLING, **facts)
        return facts

    def _roll(self, facts: Event) -> None:
        try:
            require_agreement(self._watched, facts["replaces"])
            roll_all(self._watched.servers, self._watched.store / facts["archive"], put_back=True,
                     replaces=facts["replaces"], longest_batch_s=self._watched.longest_batch_s, log=self._log)
        except EarlyExitError as error:
            self._note(ROLL_FAILED, **facts, error=str(error))
            if facts["tries"] >= _TRIES:
                self._give_up(facts)
            return
        self._note(ROLLED, **facts)

    def _clean_up(self) -> None:
        with contextlib.suppress(OSError, EarlyExitError):  # what cannot be removed now is removed later
            remove_left_over(self._watched.state / "runs", self._audit.read(), self._unfinished_run())
            stored = stored_versions(self._watched.store, self._watched.model)
            newest = stored[max(stored)] if stored else None
            if archive := self._seen.archive if self._seen else newest:
                limit_records(self._watched.sources, self._watched.model, archive)

    def _unfinished_run(self) -> str | None:
        """Return the name of the run that the next tick continues, if there is one."""
        event = self._audit.latest(ATTEMPT, KEPT, ROLLING)
        if event is None or event["event"] != ATTEMPT or event.get("tries", _TRIES) >= _TRIES:
            return None
        return event["run"] if self._seen is None or event["version"] == self._seen.version else None

    def _note(self, event: str, **evidence: Any) -> None:
        about = ", ".join(f"{key} {value}" for key, value in evidence.items() if not isinstance(value, (dict, list)))
        self._log(f"{event}: {about}")
        self._audit.append(event, **evidence)
