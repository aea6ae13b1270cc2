"""`ee-serve`: TorchServe on loopback with the right Java, allocator, tokens and metrics."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from early_exit.archiver.addresses import Addresses
from early_exit.archiver.server import TorchServe, raise_on_terminate
from early_exit.handler.errors import EarlyExitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ee-serve` until Ctrl-C; return its exit status."""
    parser = argparse.ArgumentParser(
        "ee-serve", description="Start TorchServe on loopback and stop it, with its workers, on Ctrl-C.")
    parser.add_argument("models", nargs="*", help=".mar file names in the model store to load at the start")
    parser.add_argument("--model-store", type=Path, default=Path("model-store"), help="(%(default)s)")
    parser.add_argument("--records", type=Path, default=Path("records"), help="folder for the records (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path(".ee-serve"),
                        help="tokens, logs, temporary files (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="inference; management and metrics follow (%(default)s)")
    parser.add_argument("--token-minutes", type=int, default=60, help="how long tokens are valid (%(default)s)")
    parser.add_argument("--threads", type=int, help="of one worker; by default half the cores")
    options = parser.parse_args(arguments)
    raise_on_terminate()
    server = TorchServe(
        options.model_store, options.state, Addresses.on_loopback(*range(options.port, options.port + 3)),
        records=options.records, models=[Path(model).name for model in options.models],
        token_minutes=options.token_minutes, threads=options.threads)
    try:
        with server:
            print(f"inference   {server.addresses.inference}")
            print(f"management  {server.addresses.management}")
            print(f"metrics     {server.addresses.metrics}/metrics")
            print(f"tokens      {server.key_file}")
            print(f"records     {options.records.resolve()}")
            print("Ctrl-C stops it", flush=True)
            return server.wait()
    except KeyboardInterrupt:
        return 0
    except EarlyExitError as error:
        print(f"ee-serve: {error}", file=sys.stderr)
        return 1
