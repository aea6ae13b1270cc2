"""Brings a new model version into service without losing a request.

The order loses nothing: register beside the old version, wait until the workers are ready, try the new
version out, make it the default, let the old version finish what it has, and only then remove it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.archiver.control import ModelServer, VersionStatus
from early_exit.archiver.packaging.describe import describe
from early_exit.archiver.rollout.sample_answer import require_same_answer
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.config import EARLY
from early_exit.handler.errors import ArchiveError, FormatError, ServerError
from early_exit.handler.protocol import SECRET_VARIABLE
from early_exit.handler.sample_request import SampleRequest

_POLL_S = 0.2
LONGEST_BATCH_S = 5.0
"""How long a worker may at least still work on the batch that it took before its queue was seen empty: a server does
not tell, and removing a version ends its workers."""
_BUSY_FACTOR = 2
"""A batch may take this many times as long as its requests one after the other, on a machine that is busy."""


@dataclass(frozen=True)
class RollReport:
    """What a roll did."""

    model: str
    version: str
    replaced: str | None
    """The version that was removed; none when the model was new."""
    ready_s: float
    """Seconds from registration until every worker was ready."""
    drained_s: float
    """Seconds from the switch until the old version was removed."""
    replaced_archive: str | None = None
    """File name of the removed version's archive in the model store; none when the model was new."""


def roll(server: ModelServer, mar: Path, *, request: SampleRequest | None = None, untried: bool = False,
         ready_limit_s: float = 300.0, drain_limit_s: float = 300.0, longest_batch_s: float | None = None,
         log: Callable[[str], None] = lambda line: None) -> RollReport:
    """Replace the served version of a model by the one in an archive.

    Args:
        server: the server to bring it into.
        mar: an archive in the server's model store.
        request: body of a request that the new version must answer before it gets any traffic; by default
            the archive's sample request.
        untried: whether the version may serve though no request is known that tries it out.
        ready_limit_s: how long the new workers may take to start.
        drain_limit_s: how long the old version may take to answer what it has.
        longest_batch_s: how long the old version's workers may take for one batch, by default `LONGEST_BATCH_S`; longer
            where the request that tries out the new version, run to the end, says so. Without the server's secret no
            request says so, and it has to be given.
        log: called with a line about each step.

    Raises:
        ServerError: a step failed. Before the switch the old version goes on serving and the new one is
            removed; after it the new version serves and the old one is left as it is.
    """
    contents = describe(mar)
    model, version = contents["model"], contents["version"]
    registered = server.versions(model)
    if any(status.version == version for status in registered):
        raise ServerError(f"{model} {version} is registered already: give the archive another --version")
    old = next((status for status in registered if status.is_default), None)
    if not untried and request is None:
        _require_tried(mar, contents, old)
    if old is not None:
        require_known_batch(server, longest_batch_s)
    longest_batch_s = LONGEST_BATCH_S if longest_batch_s is None else longest_batch_s
    started = time.monotonic()
    log(f"registering {model} {version}")
    server.register(mar.name, workers=max(1, old.n_workers if old else 1))
    try:
        _wait_until_ready(server, model, version, ready_limit_s)
        if old is not None and contents["answers"] != EARLY and (workers := _scaled_to(old, mar.parent)):
            server.scale(model, version, workers)
            _wait_until_ready(server, model, version, ready_limit_s)
        ready_s = time.monotonic() - started
        log(f"ready after {ready_s:.1f} s")
        alone_s = _try_out(server, mar, contents, request, log)
        if old is not None:
            longest_batch_s = max(longest_batch_s, _BUSY_FACTOR * old.batch_size * alone_s)
        server.set_default(model, version)
    except BaseException as error:
        _remove_quietly(server, model, version, log)
        if isinstance(error, ServerError) and old is not None:
            raise ServerError(f"{error}\n{model} {old.version} goes on serving") from error
        raise
    log(f"{version} is the default")
    switched = time.monotonic()
    if old is not None:
        retire(server, model, old, drain_limit_s=drain_limit_s, longest_batch_s=longest_batch_s)
        log(f"{old.version} has answered everything and is removed")
    return RollReport(model, version, old.version if old else None, ready_s, time.monotonic() - switched,
                      old.file_name if old else None)


def require_known_batch(server: ModelServer, longest_batch_s: float | None) -> None:
    """Check that it is known, or can be measured, how long a batch takes on a server.

    Raises:
        ServerError: it is neither.
    """
    if longest_batch_s is None and not server.has_secret:
        raise ServerError(f"the secret of the workers of {server} is not known, so no request can be run to the end to "
                          "tell how long a batch takes: pass --longest-batch-s, the seconds that the served version "
                          "may take for one, or --secret FILE, with which the new version is probed and measured "
                          "(ee-serve makes the file; another server needs what it holds in the variable "
                          f"{SECRET_VARIABLE})")


def retire(server: ModelServer, model: str, version: VersionStatus, *, drain_limit_s: float = 300.0,
           longest_batch_s: float | None = None) -> None:
    """Remove a version that gets no requests any more once it has answered those that it got.

    Args:
        server: the server that has it.
        model: name of the model.
        version: a version of it that is not the default.
        drain_limit_s: how long it may take to answer what it has.
        longest_batch_s: how long its workers may take for one batch, by default `LONGEST_BATCH_S`.

    Raises:
        ServerError: it still has requests; it is left registered.
    """
    _drain(server, model, version, drain_limit_s, LONGEST_BATCH_S if longest_batch_s is None else longest_batch_s)
    server.unregister(model, version.version)


def _scaled_to(old: VersionStatus, store: Path) -> int | None:
    """Return the workers that a version was given while it served, if these are others than its archive asks for."""
    archive = store / old.file_name
    try:
        archived = describe(archive)["workers"] or 1
    except (ArchiveError, FormatError):  # not one of ours, or not here
        return None
    return old.n_workers if old.n_workers and old.n_workers != archived else None


def _require_tried(mar: Path, contents: dict[str, Any], old: VersionStatus | None) -> None:
    """Check that a backbone answers a real request before it serves, or serves already.

    Raises:
        ServerError: no request is known.
    """
    if contents["samples"] or (old is not None and _backbone_of(mar.parent / old.file_name)
                               == contents["backbone"]["sha256"]):
        return
    raise ServerError(f"{mar.name} has no sample request, so its backbone has never answered a real one: pass "
                      "--request FILE, here or to ee-archive, or --untried if it shall serve all the same")


def _backbone_of(archive: Path) -> str | None:
    try:
        return read_archive(archive).description.sha256
    except (ArchiveError, FormatError):  # not one of ours, or not here
        return None


def _try_out(server: ModelServer, mar: Path, contents: dict[str, Any], request: SampleRequest | None,
             log: Callable[[str], None]) -> float:
    """Check that a version computes what its archive does, and answers; return the seconds of a request that ran to the
    end, 0 where none did."""
    model, version, archive = contents["model"], contents["version"], read_archive(mar)
    if server.has_secret:
        _require_same(contents, server.probe(model, version))
        sample = request if request is not None else next(iter(archive.samples), None)
        if sample is None:
            return 0.0
        server.predict(model, version, sample)
        sent = time.monotonic()
        server.predict(model, version, sample, to_the_end=True)
        return time.monotonic() - sent
    samples = [sample for sample in (request, *archive.samples[:1]) if sample is not None]
    predictions = [server.predict(model, version, sample) for sample in samples]
    if archive.sample_answers:
        require_same_answer(archive, contents["engine"], predictions[-1])
        log("not probed, for want of the server's secret: its sample request is answered as where the archive was made")
    else:
        log("not probed, for want of the server's secret, and the archive has no answer of its own to compare with: "
            "whether the server loaded this archive, or another of that name, is not known")
    return 0.0


def _require_same(contents: dict[str, Any], probe: dict[str, Any]) -> None:
    """Check that the server loaded this archive, not another file of that name in its model store."""
    # No plan is told where the configuration says "exits: false".
    if (probe.get("backbone") != contents["backbone"]["sha256"]
            or probe.get("plan") not in (None, contents["plan_digest"])):
        raise ServerError("the server loaded another archive of that name: is this one in its model store?")


def _wait_until_ready(server: ModelServer, model: str, version: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        status = _status_of(server, model, version)
        if status is not None and status.n_ready >= max(1, status.n_workers):
            return
        time.sleep(_POLL_S)
    raise ServerError(f"{model} {version} was not ready within {limit_s:.0f} s: its log is in the server's model log")


def _drain(server: ModelServer, model: str, old: VersionStatus, limit_s: float,
           longest_batch_s: float) -> None:
    """Wait until the old version's queue is empty and the batches that its workers took have passed."""
    deadline = time.monotonic() + limit_s
    empty_since: float | None = None
    settle_s = longest_batch_s + old.max_batch_delay_s
    while time.monotonic() < deadline:
        status = _status_of(server, model, old.version)
        if status is None:
            raise ServerError(f"{model} {old.version} disappeared while it was drained: did someone else roll?")
        now = time.monotonic()
        empty_since = (empty_since or now) if status.pending_requests == 0 else None
        if empty_since is not None and now - empty_since >= settle_s:
            return
        time.sleep(_POLL_S)
    raise ServerError(f"{model} {old.version} still had requests after {limit_s:.0f} s; it is left registered, and the "
                      "new version is the default")


def _status_of(server: ModelServer, model: str, version: str) -> VersionStatus | None:
    return next((status for status in server.versions(model) if status.version == version), None)


def _remove_quietly(server: ModelServer, model: str, version: str, log: Callable[[str], None]) -> None:
    try:
        status = _status_of(server, model, version)
        if status is not None and status.is_default:
            log(f"{version} has become the default all the same and is left to serve")
        elif status is not None:
            server.unregister(model, version)
            log(f"{version} is removed again")
    except ServerError as error:  # the failure that led here is the one to report
        log(f"{version} could not be removed: {error}")
