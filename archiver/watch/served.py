"""The versions that the servers of a watched model serve: replacing, removing and comparing them."""

from __future__ import annotations

from collections.abc import Callable

from early_exit.archiver.control import ModelServer
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.retiring import retire
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.watched import Watched
from early_exit.handler.errors import ServerError


def replace_version(watched: Watched, version: str, by: str, archive: str, log: Callable[[str], None]) -> None:
    """Replace a version by another one on every server that serves it, whatever an interrupted roll has left."""
    for server in watched.servers:
        versions = server.versions(watched.model)
        serves = next((registered.version for registered in versions if registered.is_default), None)
        if serves == by:
            remove_version(watched, server, version)
        elif serves == version:
            remove_version(watched, server, by)
            roll_all([server], watched.store / archive, longest_batch_s=watched.longest_batch_s, log=log)
        else:  # somebody else decided
            log(f"{server} serves {serves}, neither {version} nor {by}, and keeps it")


def remove_version(watched: Watched, server: ModelServer, version: str) -> None:
    """Remove a version that gets no new requests, if it is registered."""
    for registered in server.versions(watched.model):
        if registered.version == version and not registered.is_default:
            retire(server, watched.model, registered, longest_batch_s=watched.longest_batch_s)


def require_agreement(watched: Watched, status: ModelStatus) -> None:
    """Check that all servers serve the version of the first one; a server that was restarted may not.

    Raises:
        ServerError: a server serves another version.
    """
    for server in watched.servers:
        if not any(registered.version == status.version and registered.is_default
                   for registered in server.versions(status.model)):
            raise ServerError(f"{server} does not serve {status.model} {status.version} as "
                              f"{watched.servers[0]} does: bring one version into all of them with ee-roll")
