"""The versions that the servers of a watched model serve: rolling in, taking back, removing and comparing them."""

from __future__ import annotations

from collections.abc import Callable

from early_exit.archiver.control import ModelServer, default_of
from early_exit.archiver.rollout.fleet import roll_all, switch_back
from early_exit.archiver.rollout.retiring import retire
from early_exit.archiver.watch.watched import Watched
from early_exit.handler.errors import EarlyExitError, ServerError


def finish_roll(watched: Watched, replaced: str, version: str, archive: str, log: Callable[[str], None]) -> None:
    """Roll a version into every server that still serves the replaced one, whatever an interrupted roll has left.

    Raises:
        ServerError: a server failed; those after it have been rolled nevertheless.
    """
    def finish(server: ModelServer) -> None:
        serves = _default(server, watched.model)
        if serves == version:
            remove_version(watched, server, replaced)
        elif serves == replaced:
            remove_version(watched, server, version)
            roll_all([server], watched.store / archive, replaces=replaced, longest_batch_s=watched.longest_batch_s,
                     log=log)
        else:  # somebody else decided
            log(f"{server} serves {serves}, neither {replaced} nor {version}, and keeps it")

    _on_every_server(watched, finish)


def take_back(watched: Watched, version: str, to: str, archive: str, log: Callable[[str], None]) -> None:
    """Make the version from before the default again on every server that serves `version`, and remove that one.

    Where the version from before is still registered, it is the default at once. `version` is removed only after that,
    because its last requests may take minutes, in which another server would go on serving it.

    Args:
        watched: the model, with its servers.
        version: the version to take back.
        to: the version from before.
        archive: the file name of that version's archive in the store.
        log: receives a line for each step.

    Raises:
        ServerError: a server failed; the version has been taken back from the others nevertheless.
    """
    def switch(server: ModelServer) -> None:
        serves = _default(server, watched.model)
        if serves not in (version, to):  # somebody else decided
            log(f"{server} serves {serves}, neither {version} nor {to}, and keeps it")
        elif serves == version and not switch_back(server, watched.model, to):
            remove_version(watched, server, to)
            roll_all([server], watched.store / archive, replaces=version, longest_batch_s=watched.longest_batch_s,
                     log=log)

    def remove(server: ModelServer) -> None:
        if _default(server, watched.model) == to:
            remove_version(watched, server, version)

    _on_every_server(watched, switch, remove)


def remove_version(watched: Watched, server: ModelServer, version: str) -> None:
    """Remove a version that gets no new requests, if it is registered."""
    for registered in server.versions(watched.model):
        if registered.version == version and not registered.is_default:
            retire(server, watched.model, registered, longest_batch_s=watched.longest_batch_s)


def require_agreement(watched: Watched, version: str) -> None:
    """Check that all servers serve a version; a server that was restarted may not, or one with another roll.

    Raises:
        ServerError: a server serves another version.
    """
    for server in watched.servers:
        if (serves := _default(server, watched.model)) != version:
            raise ServerError(f"expected every server to serve {watched.model} {version}, but {server} serves "
                              f"{serves or 'no version'}: bring one version into all of them with ee-roll")


def _on_every_server(watched: Watched, *steps: Callable[[ModelServer], None]) -> None:
    """Take each step on all servers before the next step, also if servers fail; report all failures at the end."""
    failures = []
    for step in steps:
        for server in watched.servers:
            try:
                step(server)
            except EarlyExitError as error:
                failures.append(f"{server}: {error}")
    if failures:
        raise ServerError("\n".join(dict.fromkeys(failures)))


def _default(server: ModelServer, model: str) -> str | None:
    default = default_of(server.versions(model))
    return default.version if default else None
