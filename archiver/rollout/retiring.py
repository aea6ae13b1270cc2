"""Removes a version that no longer gets requests, once it has answered those that it has."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from early_exit.archiver.control import ModelServer, VersionStatus
from early_exit.archiver.rollout.clock import MACHINE_CLOCK, Clock
from early_exit.handler.errors import ServerError
from early_exit.handler.protocol import SECRET_VARIABLE

POLL_S = 0.2
"""The seconds between two checks of a server's state."""
_FAILURES = 3
"""After so many failures in a row, a server is not asked for its count again: a firewall may swallow the connection,
and each attempt would take seconds."""
LONGEST_BATCH_S = 5.0
"""The least time, in seconds, that a worker gets for its last batch, unless another time is given. A worker may have
taken a batch before its queue was seen empty: a server does not report such batches, and removing a version ends its
workers."""


def require_known_batch(server: ModelServer, longest_batch_s: float | None) -> None:
    """Check that the time of a batch on a server is known, or can be measured.

    Raises:
        ServerError: the time is not known and cannot be measured.
    """
    if longest_batch_s is None and not server.has_secret:
        raise ServerError(f"the secret of the workers of {server} is not known, so no request can be run to the end to "
                          "tell how long a batch takes: pass --longest-batch-s, the seconds that the served version "
                          "may take for a batch, or --secret FILE, with which the new version is probed and its time "
                          "measured (ee-serve writes the file; another server needs its content in the variable "
                          f"{SECRET_VARIABLE})")


def retire(server: ModelServer, model: str, version: VersionStatus, *, drain_limit_s: float = 300.0,
           longest_batch_s: float | None = None, clock: Clock = MACHINE_CLOCK) -> None:
    """Remove a version that no longer gets requests, once it has answered those that it has.

    Args:
        server: the server that has the version.
        model: the name of the model.
        version: a version of the model that is not the default.
        drain_limit_s: how long the version may take to answer its requests.
        longest_batch_s: how long its workers may take for one batch; by default `LONGEST_BATCH_S`.
        clock: the clock to wait with.

    Raises:
        ServerError: the version still has requests and stays registered, or the server could not remove it.
    """
    longest_batch_s = LONGEST_BATCH_S if longest_batch_s is None else longest_batch_s
    _drain(server, model, version, drain_limit_s, longest_batch_s, clock)
    try:
        server.unregister(model, version.version)
    except ServerError as error:
        raise ServerError(f"{error}\n{model} {version.version} could not be removed. It gets no requests any more, "
                          "because another version is the default") from error


@contextlib.contextmanager
def kept_in_store(archive: Path) -> Iterator[bool]:
    """Keep an archive that the server deletes from its model store together with the version; yield whether it is kept.
    """
    aside = archive.with_name(f".{archive.name}.{secrets.token_hex(4)}")
    try:
        _link_or_copy(archive, aside)
    except OSError:  # the archive is not here, or the store is full or read-only
        aside.unlink(missing_ok=True)
        yield False
        return
    try:
        yield True
    finally:
        if archive.exists():
            aside.unlink()
        else:
            aside.rename(archive)


def _link_or_copy(archive: Path, to: Path) -> None:
    try:
        os.link(archive, to)
    except OSError:  # as in a store without hard links
        shutil.copyfile(archive, to)


def _drain(server: ModelServer, model: str, old: VersionStatus, limit_s: float, longest_batch_s: float,
           clock: Clock) -> None:
    """Wait until the old version gets no requests, and then for the batches that its workers have taken.

    A request that names the version may be answered so fast that the queue is never seen with it. The server's own
    count of such requests shows it. While that count cannot be read, there may be such requests. A server that gives
    none several times in a row has none to give.
    """
    deadline = clock.now() + limit_s
    idle_since: float | None = None
    counted = server.named_requests(model, old.version)
    n_failed = int(counted is None)
    settle_s = longest_batch_s + (old.settings.max_batch_delay_ms or 0) / 1000
    while clock.now() < deadline:
        status = next((status for status in server.versions(model)
                       if (status.version, status.claim) == (old.version, old.claim)), None)
        if status is None:
            raise ServerError(f"{model} {old.version} disappeared while it was drained: did someone else roll?")
        is_busy = bool(status.pending_requests)
        if n_failed < _FAILURES:
            before, counted = counted, server.named_requests(model, old.version)
            n_failed = n_failed + 1 if counted is None else 0
            is_busy |= n_failed < _FAILURES and (counted is None or counted != before)
        now = clock.now()
        if is_busy:
            idle_since = None
        elif idle_since is None:
            idle_since = now
        if idle_since is not None and now - idle_since >= settle_s:
            return
        clock.sleep(POLL_S)
    raise ServerError(f"{model} {old.version} still had requests after {limit_s:.0f} s; it is left registered, and "
                      "another version is the default")
