"""`ee-gateway`: a WebSocket that answers items one by one, and a live page, in front of a TorchServe."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from early_exit.archiver.audit import AUDIT_FILE, Audit
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.tokens import KEY_FILE
from early_exit.handler.errors import ConfigError, ServerError
from early_exit.training.command import command_parser, run_command

TOKEN_VARIABLE = "EE_GATEWAY_TOKEN"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-gateway` until Ctrl-C; return its exit status."""
    options = parser().parse_args(argv)
    return run_command("ee-gateway", lambda: _serve(options))


def _serve(options: argparse.Namespace) -> int:
    try:
        from early_exit.archiver.gateway.app import LOOPBACK, create_app
        from early_exit.archiver.gateway.asgi_server import make_server
        from early_exit.archiver.gateway.certificates import Promises
        from early_exit.archiver.gateway.messages import Limits
        from early_exit.archiver.gateway.upstream import PREDICTION_S
        from early_exit.archiver.torchserve.management import AsyncManagement
    except ImportError as error:
        raise ConfigError(f"the gateway needs {error.name}: pip install 'early-exit-torchserve[gateway]'") from error
    token = os.environ.get(TOKEN_VARIABLE)
    if options.host not in LOOPBACK and not token:
        raise ConfigError(f"{options.host} can be reached from elsewhere: set {TOKEN_VARIABLE} to a secret that "
                          "clients send as 'Authorization: Bearer ...' or ?token=..., or listen on 127.0.0.1")
    limits = Limits(options.max_items, options.max_bytes, options.in_flight, options.in_flight_in_all)
    upstream = AsyncManagement(Addresses.of_server(options.server), None if options.no_tokens else options.tokens,
                               connections=limits.in_flight_in_all, prediction_s=PREDICTION_S)
    app = create_app(upstream, token=token, limits=limits, plans=Promises(options.model_store).of,
                     decisions=lambda model: Audit(options.watch / model / AUDIT_FILE).read())
    server = make_server(app, options.host, options.port, limits, lambda: _print_addresses(options))
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again after it has stopped in good order
        server.run()
        if not server.started:
            raise ServerError(f"cannot listen on {options.host}:{options.port}: choose another --port")
    return 0


def _print_addresses(options: argparse.Namespace) -> None:
    addresses = {"page": f"http://{options.host}:{options.port}/",
                 "websocket": f"ws://{options.host}:{options.port}/ws/MODEL"}
    if options.json:
        print(json.dumps(addresses), flush=True)
    else:
        print(f"live page   {addresses['page']}\nwebsocket   {addresses['websocket']}\nCtrl-C stops it", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-gateway`'s command line."""
    parser = command_parser(
        "ee-gateway", "Serve a live page about what the exits do, and a WebSocket that takes batches of items and "
        "sends each answer as soon as it is there.", """
        beside the server that ee-serve started here:
          ee-gateway
        for other machines, with a token of its own:
          EE_GATEWAY_TOKEN=secret ee-gateway --host 0.0.0.0 --port 9000""")
    parser.add_argument("--server", default="http://127.0.0.1:8080", metavar="URL[,URL]",
                        help="TorchServe's inference address, and the management address unless it is the next port "
                        "(%(default)s)")
    parser.add_argument("--tokens", type=Path, default=Path(".ee-serve") / KEY_FILE, metavar="FILE",
                        help="TorchServe's key file (%(default)s)")
    parser.add_argument("--no-tokens", action="store_true", help="TorchServe runs without token authorisation")
    parser.add_argument("--model-store", type=Path, default=Path("model-store"),
                        help="TorchServe's, to read the certificates from (%(default)s)")
    parser.add_argument("--watch", type=Path, default=Path(".ee-watch"), metavar="FOLDER",
                        help="where ee-watch keeps its decisions (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8090, help="(%(default)s)")
    parser.add_argument("--max-items", type=int, default=64, metavar="N", help="in a message (%(default)s)")
    parser.add_argument("--max-bytes", type=int, default=10 * 2**20, metavar="N", help="of an item (%(default)s)")
    parser.add_argument("--in-flight", type=int, default=32, metavar="N",
                        help="items of a connection that TorchServe works at (%(default)s)")
    parser.add_argument("--in-flight-in-all", type=int, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="tell the addresses as one line for machines")
    return parser
