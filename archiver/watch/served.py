"""The versions that the servers of a watched model serve: replacing, removing and comparing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from early_exit.archiver.control import ModelServer, VersionStatus
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.retiring import retire
from early_exit.archiver.watch.watched import Watched
from early_exit.handler.errors import ServerError


def replace_version(watched: Watched, version: str, by: str, archive: str, log: Callable[[str], None]) -> None:
    """Replace a version by another one on every server that serves it, whatever an interrupted roll has left."""
    for server in watched.servers:
        serves = _default(server.versions(watched.model))
        if serves == by:
            remove_version(watched, server, version)
        elif serves == version:
            remove_version(watched, server, by)
            roll_all([server], watched.store / archive, replaces=version, longest_batch_s=watched.longest_batch_s,
                     log=log)
        else:  # somebody else decided
            log(f"{server} serves {serves}, neither {version} nor {by}, and keeps it")


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
        if (serves := _default(server.versions(watched.model))) != version:
            raise ServerError(f"expected every server to serve {watched.model} {version}, but {server} serves "
                              f"{serves or 'no version'}: bring one version into all of them with ee-roll")


def _default(versions: Sequence[VersionStatus]) -> str | None:
    return next((registered.version for registered in versions if registered.is_default), None)
