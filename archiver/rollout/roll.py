"""Brings a new model version into service without losing a request.

The order of the steps loses no request: register the new version beside the old one, wait until its workers are ready,
try it out, make it the default, let the old version finish its requests, and only then remove the old version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from early_exit.archiver.control import ModelServer, RunSettings, VersionStatus, default_of
from early_exit.archiver.packaging.registered import RegisteredArchive, registered_archive
from early_exit.archiver.rollout.clock import MACHINE_CLOCK, Clock
from early_exit.archiver.rollout.retiring import LONGEST_BATCH_S, POLL_S, kept_in_store, require_known_batch, retire
from early_exit.archiver.rollout.rivals import Candidate, identity_of_default
from early_exit.archiver.rollout.settings import SettingsPlan, in_words, plan_settings, require_kept
from early_exit.archiver.rollout.try_out import TryOut
from early_exit.handler.errors import EarlyExitError, ServerError
from early_exit.handler.sample_request import SampleRequest

_BUSY_FACTOR = 2
"""On a busy machine, a batch may take this many times as long as its requests take one after the other."""


@dataclass(frozen=True)
class RollReport:
    """The result of a roll."""

    model: str
    version: str
    replaced: str | None
    """The version that was removed; None if the model was new."""
    ready_s: float
    """The seconds from registration until every worker was ready."""
    drained_s: float
    """The seconds from the switch until the old version was removed."""
    longest_batch_s: float
    """The longest time, in seconds, that a batch was assumed to take."""
    replaced_archive: str | None = None
    """The file name of the removed version's archive in the model store; None if the model was new."""
    replaced_settings: RunSettings | None = None
    """The settings of the removed version."""
    kept: RunSettings | None = None
    """The settings of the removed version that the new version has; None if the model was new."""
    changed: RunSettings | None = None
    """The settings that the new version's own configuration changes."""
    warning: str | None = None
    """A warning that the roll did what was asked for, but probably not what was meant."""


class SwitchedError(ServerError):
    """A roll failed after its switch: the new version serves, and the old one may still be registered."""

    def __init__(self, message: str, report: RollReport) -> None:
        super().__init__(message)
        self.report = report
        """The report that the roll would have returned if it had removed the old version."""


def roll(server: ModelServer, mar: Path, *, name: str | None = None, found: Sequence[VersionStatus] | None = None,
         replaces: str | None = None, settings: RunSettings | None = None, request: SampleRequest | None = None,
         untried: bool = False, ready_limit_s: float = 300.0, drain_limit_s: float = 300.0,
         longest_batch_s: float | None = None, clock: Clock = MACHINE_CLOCK,
         log: Callable[[str], None] = lambda line: None) -> RollReport:
    """Replace the served version of a model by the one in an archive that `ee-archive` or torch-model-archiver made.

    Args:
        server: the server to bring the version into.
        mar: an archive in the server's model store.
        name: the name of the model on the server; by default the name in the archive.
        found: the versions that were registered when the roll began; by default those that are registered now. The roll
            fails if another version has become the default since.
        replaces: the version that must be the default when the roll begins; by default any version may be.
        settings: the settings that the new version's configuration leaves open; by default those of the old version.
        request: a request that the new version must answer before it gets any traffic; by default
            the archive's sample request.
        untried: whether the version may serve although no request is known to try it out with.
        ready_limit_s: how long the new workers may take to start, and how long to wait for other rolls of the model.
        drain_limit_s: how long the old version may take to answer its requests.
        longest_batch_s: how long the old version's workers may take for one batch; by default `LONGEST_BATCH_S`. The
            request that tries out the new version is run to the end, and if its time suggests longer batches, that time
            is used. Without the server's secret, no request can be run to the end, and the time must be given.
        clock: the clock of this roll.
        log: receives a line for each step.

    Raises:
        ServerError: a step failed, or another roll of the model comes first. Before the switch, the old version keeps
            serving and the new one is removed; after it, the error is a SwitchedError, the new version serves, and the
            old one is left as it is.
    """
    archive = registered_archive(mar)
    model, version = name or archive.model, archive.version
    registered = server.versions(model)
    if (same := next((status for status in registered if status.version == version), None)) is not None:
        raise ServerError(f"{model} {version} is registered already{' and serves' if same.is_default else ''}: "
                          "give the archive another --version")
    if found is not None and identity_of_default(found) != identity_of_default(registered):
        raise ServerError(f"another version of {model} has become the default since this roll began: did someone else "
                          "roll?")
    old = default_of(registered)
    if replaces is not None and (old is None or old.version != replaces):
        raise ServerError(f"{version} is to replace {model} {replaces}, so that must be the default, but "
                          f"{old.version if old else 'no version'} is: did someone else roll?")
    candidate = Candidate(server, model, version, registered if found is None else found, clock)
    old_archive = _archive_of(old, mar.parent)
    trial = TryOut(mar, archive, old_archive, request)
    if not untried:
        trial.require_request()
    if old is not None:
        require_known_batch(server, longest_batch_s)
    plan = _plan(archive, old, old_archive, settings)
    rolled = _Roll(server, model, archive, candidate, old, plan, trial, clock, log)
    report = RollReport(model, version, None, 0.0, 0.0, LONGEST_BATCH_S if longest_batch_s is None else longest_batch_s,
                        warning=_warning(server, mar, model, archive) if old is None else None)
    if old is not None:
        report = replace(report, replaced=old.version, replaced_archive=old.file_name, replaced_settings=old.settings,
                         kept=plan.kept, changed=plan.changed)
    try:
        ready_s, measured_s = rolled.bring_in(mar.name, ready_limit_s)
    except ServerError as error:
        if old is None:
            raise
        raise _failure(error, candidate, report) from error
    report = replace(report, ready_s=ready_s, longest_batch_s=max(report.longest_batch_s, measured_s))
    if old is None:
        return report
    switched = clock.now()
    try:
        rolled.retire(old, mar.parent, drain_limit_s, report.longest_batch_s)
    except ServerError as error:
        raise _failure_after_switch(error, report) from error
    return replace(report, drained_s=clock.now() - switched)


@dataclass(frozen=True)
class _Roll:
    """A roll that knows the state of its server."""

    server: ModelServer
    model: str
    archive: RegisteredArchive
    candidate: Candidate
    old: VersionStatus | None
    plan: SettingsPlan
    trial: TryOut
    clock: Clock
    log: Callable[[str], None]

    def bring_in(self, file_name: str, ready_limit_s: float) -> tuple[float, float]:
        """Make the new version the default; return the seconds until it was ready, and the seconds that a batch of the
        old version may take, or 0 if they are not known.

        Raises:
            ServerError: a step failed; the version is removed, unless its switch took effect late.
        """
        version, old, started = self.archive.version, self.old, self.clock.now()
        self.log(f"registering {self.model} {version}")
        try:
            self.candidate.register(file_name, self.plan.to_register)
            self._wait_until_ready(ready_limit_s)
            if self.plan.workers is not None:
                self.server.scale(self.model, version, self.plan.workers)
                self._wait_until_ready(ready_limit_s)
            if old is not None:
                require_kept(self.plan, self.candidate.status().settings, version, old.version)
                for line in in_words(self.plan, old.settings, old.version):
                    self.log(line)
            ready_s = self.clock.now() - started
            self.log(f"ready after {ready_s:.1f} s")
            alone_s = self.trial.run(self.server, self.model, self.clock, self.log)
            self.candidate.become_default(ready_limit_s)
        except BaseException:
            self.candidate.take_back(self.log)
            raise
        self.log(f"{version} is the default")
        return ready_s, _BUSY_FACTOR * (old.settings.batch_size or 1) * alone_s if old else 0.0

    def retire(self, old: VersionStatus, store: Path, drain_limit_s: float, longest_batch_s: float) -> None:
        """Remove the old version once it has answered everything, and check that the new one is still the default."""
        with kept_in_store(store / old.file_name) if old.is_downloaded else nullcontext(True) as is_kept:
            retire(self.server, self.model, old, drain_limit_s=drain_limit_s, longest_batch_s=longest_batch_s,
                   clock=self.clock)
        if not is_kept:
            self.log(f"the server has deleted {old.file_name}, which it had fetched by a URL and which could not be "
                     f"kept: to go back to {old.version}, put it into the model store again")
        self.log(f"{old.version} has answered everything and is removed")
        self.candidate.require_default()

    def _wait_until_ready(self, limit_s: float) -> None:
        deadline = self.clock.now() + limit_s
        while self.clock.now() < deadline:
            status = self.candidate.status()
            if status.n_ready >= max(1, status.n_workers):
                return
            self.clock.sleep(POLL_S)
        raise ServerError(f"{self.model} {self.archive.version} was not ready within {limit_s:.0f} s: its log is in "
                          "the server's model log")


def _failure(error: ServerError, candidate: Candidate, report: RollReport) -> ServerError:
    """Return the error of a version that could not be brought in place of another one; it tells what serves now."""
    old, serves = f"{report.model} {report.replaced}", candidate.serves()
    if serves:  # its switch took effect after the wait for the answer was over
        return _failure_after_switch(error, report)
    if serves is None:
        return ServerError(f"{error}\nthe server does not answer, so it is not known whether {old} keeps serving")
    return ServerError(f"{error}\n{old} keeps serving")


def _failure_after_switch(error: ServerError, report: RollReport) -> SwitchedError:
    return SwitchedError(f"the roll of {report.model} {report.version} failed after its switch: {error}", report)


def _archive_of(old: VersionStatus | None, store: Path) -> RegisteredArchive | None:
    """Return the archive of the version that serves; None if it cannot be read here."""
    try:
        return None if old is None else registered_archive(store / old.file_name)
    except EarlyExitError:
        return None


def _plan(archive: RegisteredArchive, old: VersionStatus | None, old_archive: RegisteredArchive | None,
          settings: RunSettings | None) -> SettingsPlan:
    if settings is not None:  # the settings with which this archive served before
        return plan_settings(settings, archive.configured, archive)
    return plan_settings(old.settings if old else None, old_archive.configured if old_archive else None, archive)


def _warning(server: ModelServer, mar: Path, model: str, archive: RegisteredArchive) -> str | None:
    """Return a warning if an archive replaces nothing, although it was made from another one."""
    if archive.made_from is None:
        return None
    others = ", ".join(sorted(server.models()))
    return (f"no version of {model} was registered on {server}, so {mar.name} replaces nothing there, though it was "
            f"made from {archive.made_from}. " + (f"If it should replace {others}, remove it and pass --as NAME"
                                                  if others else "The server had no models at all"))
