"""The servers of a command: the options of `ee-roll` and `ee-watch` that name them, and their clients."""

from __future__ import annotations

import argparse
from pathlib import Path

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.tokens import KEY_FILE, SECRET_FILE
from early_exit.handler.errors import ServerError


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the servers; `servers_of` reads them."""
    parser.add_argument("--port", type=int, default=8080,
                        help="the inference port of a server on this machine; the next port is the management port "
                             "(%(default)s)")
    parser.add_argument("--server", action="append", default=[], metavar="URL[,URL]",
                        help="the inference address of another server, such as http://10.0.0.7:8080, and its "
                             "management address unless that is the next port; pass it once for each server")
    parser.add_argument("--tokens", type=Path, action="append", metavar="FILE",
                        help="TorchServe's key file, one for all servers or one for each server "
                             f"(.ee-serve/{KEY_FILE})")
    parser.add_argument("--secret", type=Path, action="append", default=[], metavar="FILE",
                        help="the file with the secret of the servers' workers, with which they answer a probe, one "
                             f"for all servers or one for each server; by default the file {SECRET_FILE} beside each "
                             "key file")
    parser.add_argument("--no-tokens", action="store_true", help="access servers that run without token authorisation")


def servers_of(options: argparse.Namespace) -> list[Management]:
    """Return the servers that the options name.

    Raises:
        ServerError: an address is wrong, there is neither one key file nor one for each server, or a file that is named
            as a secret does not exist.
    """
    addresses = [Addresses.of_server(text) for text in options.server] or [
        Addresses.on_loopback(options.port, options.port + 1, options.port + 2)]
    key_files: list[Path] | list[None] = [None] * len(addresses)
    secret_files: list[Path] | list[None] = [None] * len(addresses)
    if not options.no_tokens:
        key_files = _for_each(options.tokens or [Path(".ee-serve") / KEY_FILE], len(addresses), "--tokens")
        secret_files = [key_file.with_name(SECRET_FILE) for key_file in key_files]
    if options.secret:
        secret_files = _for_each(options.secret, len(addresses), "--secret")
        if missing := [str(file) for file in secret_files if not file.is_file()]:
            raise ServerError(f"no secret at {' and '.join(missing)}: ee-serve makes it when it starts")
    return [Management(*server) for server in zip(addresses, key_files, secret_files)]


def _for_each(files: list[Path], n_servers: int, option: str) -> list[Path]:
    """Return a file for each server."""
    if len(files) not in (1, n_servers):
        raise ServerError(f"{len(files)} files for {n_servers} servers: pass {option} once, or once for each --server "
                          "in the same order")
    return files * n_servers if len(files) == 1 else files
