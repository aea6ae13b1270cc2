"""Rolls servers of one model, one at a time, and puts the old version back on all of them if one fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from early_exit.archiver.control import ModelServer, VersionStatus, default_of
from early_exit.archiver.packaging.registered import registered_archive
from early_exit.archiver.rollout.retiring import retire
from early_exit.archiver.rollout.rivals import SWITCH_S
from early_exit.archiver.rollout.roll import RollReport, SwitchedError, roll
from early_exit.handler.errors import EarlyExitError, ServerError


def roll_all(servers: Sequence[ModelServer], mar: Path, *, name: str | None = None, put_back: bool = False,
             log: Callable[[str], None] = lambda line: None, **limits: Any) -> list[RollReport]:
    """Roll an archive into servers, one after the other; stop at the first that fails.

    The versions of all servers are read first, so that a roll from elsewhere that reaches one of them in the meantime
    is noticed there.

    Args:
        servers: the servers, each with the archive in its model store.
        mar: the archive.
        name: the name of the model on the servers; by default the name in the archive.
        put_back: whether to put the previous version back on all servers that have the new one, if a server fails, that
            server included. The previous archive must be in the folder of the new one.
        log: receives a line for each step.
        limits: keyword arguments of `roll`.

    Raises:
        ServerError: a roll failed; the message tells which servers have which version.
    """
    done: list[tuple[ModelServer, RollReport]] = []
    model = name or registered_archive(mar).model
    found = [_versions(server, model) for server in servers]
    for number, server in enumerate(servers, start=1):
        if len(servers) > 1:
            log(f"server {number} of {len(servers)}: {server}")
        try:
            done.append((server, roll(server, mar, name=model, found=found[number - 1], log=log, **limits)))
        except EarlyExitError as error:
            if put_back and isinstance(error, SwitchedError):
                done.append((server, error.report))
            if not done:
                raise
            if not put_back:
                names = ", ".join(str(rolled) for rolled, _ in done)
                raise ServerError(f"{server}: {error}\n{names} already serve {mar.name} and keep it") from error
            outcomes = [_put_back(rolled, report, mar.parent, log, limits) for rolled, report in reversed(done)]
            raise ServerError("\n".join([f"{server}: {error}", *outcomes])) from error
    return [report for _, report in done]


def switch_back(server: ModelServer, model: str, to: str) -> bool:
    """Make a version that has served before the default again, without another trial.

    Returns:
        Whether that was possible: the version is still registered, and its workers are ready.
    """
    older = next((status for status in server.versions(model) if status.version == to), None)
    if older is None or older.n_ready < max(1, older.n_workers):
        return False
    server.set_default(model, to, limit_s=SWITCH_S)
    return True


def _versions(server: ModelServer, model: str) -> list[VersionStatus] | None:
    """Return the versions of a model; None if the server does not answer, which its roll will report."""
    with contextlib.suppress(ServerError):
        return server.versions(model)
    return None


def _put_back(server: ModelServer, report: RollReport, store: Path, log: Callable[[str], None],
              limits: dict[str, Any]) -> str:
    """Bring the version from before a roll into service again; return a sentence about the outcome."""
    model, version, old = report.model, report.version, report.replaced
    if old is None or report.replaced_archive is None:
        return f"{server} served no {model} before, so it keeps {version}"
    try:
        new = default_of(server.versions(model))
        if new is None or new.version != version:
            return f"{server} now serves {new and new.version}, which somebody else has brought in, and keeps it"
        if switch_back(server, model, old):
            retire(server, model, new, longest_batch_s=report.longest_batch_s,
                   **{name: limits[name] for name in ("drain_limit_s", "clock") if name in limits})
        else:
            roll(server, store / report.replaced_archive, log=log, **{
                **limits, "name": model, "replaces": version, "settings": report.replaced_settings, "request": None,
                "untried": True, "longest_batch_s": report.longest_batch_s})
    except EarlyExitError as error:
        return f"putting {server} back to {old} failed: {error}"
    return f"{server} was put back to {old}"
