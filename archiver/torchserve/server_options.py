"""Which servers a command works on: the options of `ee-roll` and `ee-watch`, and the clients that they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.tokens import KEY_FILE
from early_exit.handler.errors import ServerError


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
        return [Management(server, None) for server in addresses]
    tokens = options.tokens or [Path(".ee-serve") / KEY_FILE]
    if len(tokens) not in (1, len(addresses)):
        raise ServerError(f"{len(tokens)} key files for {len(addresses)} servers: pass --tokens once, or once for each "
                          "--server in the same order")
    return [Management(*pair) for pair in zip(addresses, tokens * (len(addresses) if len(tokens) == 1 else 1))]
