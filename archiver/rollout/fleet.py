"""Several servers of one model: rolled one at a time, and put back together when one fails."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from early_exit.archiver.rollout.roll import RollReport, roll
from early_exit.archiver.torchserve.addresses import KEY_FILE, Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.handler.errors import EarlyExitError, ServerError


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add where the servers are; `servers_of` reads it."""
    parser.add_argument("--port", type=int, default=8080, help="inference port on this machine; management is the next "
                        "(%(default)s)")
    parser.add_argument("--server", action="append", default=[], metavar="URL[,URL]",
                        help="inference address elsewhere, such as http://10.0.0.7:8080, and the management address "
                        "unless it is the next port; once for each server")
    parser.add_argument("--tokens", type=Path, action="append", metavar="FILE",
                        help=f"TorchServe's key file, one for all servers or one for each (.ee-serve/{KEY_FILE})")
    parser.add_argument("--no-tokens", action="store_true", help="the servers run without token authorisation")


def servers_of(options: argparse.Namespace) -> list[Management]:
    """Return the servers that were asked for.

    Raises:
        ServerError: an address is wrong, or there are neither one key file nor as many as servers.
    """
    addresses = [Addresses.of_server(text) for text in options.server] or [
        Addresses.on_loopback(options.port, options.port + 1, options.port + 2)]
    if options.no_tokens:
        return [Management(one, None) for one in addresses]
    tokens = options.tokens or [Path(".ee-serve") / KEY_FILE]
    if len(tokens) not in (1, len(addresses)):
        raise ServerError(f"{len(tokens)} key files for {len(addresses)} servers: pass --tokens once, or once for each "
                          "--server in the same order")
    return [Management(*pair) for pair in zip(addresses, tokens * (len(addresses) if len(tokens) == 1 else 1))]


def roll_all(servers: Sequence[Management], mar: Path, *, put_back: bool = False,
             log: Callable[[str], None] = lambda line: None, **limits: Any) -> list[RollReport]:
    """Roll an archive into servers, one after the other; stop at the first that fails.

    Args:
        servers: each with the archive in its model store.
        mar: the archive.
        put_back: when one fails, roll the version before into those that have the new one. Its archive must lie
            beside the new one.
        log: told about each step.
        limits: for `roll`.

    Raises:
        ServerError: a roll failed; the message tells which servers have which version.
    """
    done: list[tuple[Management, RollReport]] = []
    for number, server in enumerate(servers, start=1):
        if len(servers) > 1:
            log(f"server {number} of {len(servers)}: {server}")
        try:
            done.append((server, roll(server, mar, log=log, **limits)))
        except EarlyExitError as error:
            if not done:
                raise
            had = ", ".join(str(one) for one, _ in done)
            if not put_back:
                raise ServerError(f"{server}: {error}\n{had} already serve {mar.name} and are left so") from error
            what_became = [_put_back(one, report, mar.parent, log, limits) for one, report in reversed(done)]
            raise ServerError("\n".join([f"{server}: {error}", *what_became])) from error
    return [report for _, report in done]


def _put_back(server: Management, report: RollReport, store: Path, log: Callable[[str], None],
              limits: dict[str, Any]) -> str:
    """Roll the version before into a server again; tell what became of that."""
    if report.replaced_archive is None:
        return f"{server} served no {report.model} before, so it keeps {report.version}"
    try:
        roll(server, store / report.replaced_archive, log=log, **{**limits, "request": None})
    except EarlyExitError as error:
        return f"{server} keeps {report.version}: {error}"
    return f"{server} was put back to {report.replaced}"
