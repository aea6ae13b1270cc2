"""`ee-gateway`: a WebSocket that answers items one by one, and a live page, in front of a TorchServe."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from early_exit.archiver.audit import Event, audit_of
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.tokens import KEY_FILE, SECRET_FILE
from early_exit.handler.errors import ConfigError, ServerError
from early_exit.handler.exits.switch import SWITCHES_FOLDER
from early_exit.training.command import command_parser, run_command
from early_exit.training.environment import GATEWAY_TOKEN

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-gateway` until Ctrl-C; return its exit status."""
    options = parser().parse_args(argv)
    return run_command("ee-gateway", lambda: _serve(options))


def _serve(options: argparse.Namespace) -> int:
    try:
        from early_exit.archiver.gateway.app import create_app
        from early_exit.archiver.gateway.asgi_server import make_server
        from early_exit.archiver.gateway.certificates import Promises
        from early_exit.archiver.gateway.messages import BytesInFlight, Limits
        from early_exit.archiver.gateway.upstream import PREDICTION_S
        from early_exit.archiver.torchserve.management import AsyncManagement
    except ImportError as error:
        raise ConfigError(f"the gateway needs the module {error.name}, which is missing here: install the project with "
                          "its extra 'gateway', as in pip install '.[gateway]' in its folder") from error
    token, is_given = _token(options.host)
    limits = Limits(options.max_items, options.max_bytes, options.in_flight, options.in_flight_in_all,
                    bytes_in_all=options.max_bytes_in_all)
    if limits.bytes_in_all < limits.bytes_per_message:
        raise ConfigError(f"--max-bytes-in-all {limits.bytes_in_all} must be at least four times --max-bytes "
                          f"{limits.bytes_per_item}, the largest message")
    in_flight = BytesInFlight(limits.bytes_in_all)
    upstream = AsyncManagement(Addresses.of_server(options.server), None if options.no_tokens else options.tokens,
                               _secret_file(options), connections=limits.in_flight_in_all, prediction_s=PREDICTION_S)
    app = create_app(upstream, token=token, names=[options.host, *options.host_name], limits=limits,
                     in_flight=in_flight, plans=Promises(options.model_store).of,
                     decisions=lambda model: _decisions(options, model))
    server = make_server(app, options.host, options.port, limits, in_flight,
                         lambda: _print_addresses(options, None if is_given else token))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after an orderly stop
        server.run()
        if not server.started:
            raise ServerError(f"cannot listen on {options.host}:{options.port}: choose another --port")
    return 0


def _token(host: str) -> tuple[str, bool]:
    """Return the token that clients must send, and whether the user gave it.

    The gateway signs the requests that it passes on with TorchServe's keys, so every user of this machine who reaches
    its port could use these keys. That is why clients need a token on loopback, too.
    """
    given = os.environ.get(GATEWAY_TOKEN, "").strip()
    if not given and host not in LOOPBACK:
        raise ConfigError(f"{host} can be reached from elsewhere: set {GATEWAY_TOKEN} to a secret that clients "
                          "send as 'Authorization: Bearer ...', or listen on 127.0.0.1")
    return given or secrets.token_hex(24), bool(given)


def _secret_file(options: argparse.Namespace) -> Path | None:
    """Return the file with the secret that opens the answers of all exits to clients of the gateway; None if they are
    not open.

    Each such request costs a full pass. On loopback, the gateway serves the operator; elsewhere, its clients may be
    anyone.
    """
    if options.secret is not None:
        if not options.secret.is_file():
            raise ConfigError(f"no secret at {options.secret}: ee-serve makes it when it starts")
        return Path(options.secret)
    return None if options.no_tokens or options.host not in LOOPBACK else Path(options.tokens).with_name(SECRET_FILE)


def _decisions(options: argparse.Namespace, model: str) -> list[Event]:
    """Return the decisions of a model's watcher and operator, oldest first."""
    switches = options.switches or options.tokens.with_name(SWITCHES_FOLDER)
    events = [event for folder in (options.watch, switches) for event in audit_of(folder, model).read()]
    return sorted(events, key=itemgetter("time"))


def _print_addresses(options: argparse.Namespace, made: str | None) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    # A browser does not send the part after '#', and the page removes it from the address bar.
    addresses = {"page": f"http://{host}:{options.port}/" + (f"#token={made}" if made else ""),
                 "websocket": f"ws://{host}:{options.port}/ws/MODEL"}
    if options.json:
        print(json.dumps(addresses | ({"token": made} if made else {})), flush=True)
    else:
        token = f"{made}  (for this start; {GATEWAY_TOKEN} sets a lasting one)" if made else f"set by {GATEWAY_TOKEN}"
        print(f"live page   {addresses['page']}\nwebsocket   {addresses['websocket']}\ntoken       {token}\n"
              "Ctrl-C stops it", flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-gateway`'s command line."""
    parser = command_parser(
        "ee-gateway", "Serve a live page that shows the work of the exits, and a WebSocket that takes batches of items "
        "and sends each answer as soon as it is ready.", """
        beside the server that ee-serve started here:
          ee-gateway
        for other machines, which know this one as gpu1, with a token of your own:
          EE_GATEWAY_TOKEN=secret ee-gateway --host 0.0.0.0 --host-name gpu1 --port 9000""")
    parser.add_argument("--server", default="http://127.0.0.1:8080", metavar="URL[,URL]",
                        help="TorchServe's inference address, and its management address unless that is the next port "
                             "(%(default)s)")
    parser.add_argument("--tokens", type=Path, default=Path(".ee-serve") / KEY_FILE, metavar="FILE",
                        help="TorchServe's key file (%(default)s)")
    parser.add_argument("--secret", type=Path, metavar="FILE",
                        help="the file with the secret of TorchServe's workers; with it every client of the gateway "
                             "may ask for the prediction of every exit, which costs a full pass; on loopback by "
                             f"default the file {SECRET_FILE} beside the key file")
    parser.add_argument("--no-tokens", action="store_true",
                        help="access a TorchServe that runs without token authorisation")
    parser.add_argument("--model-store", type=Path, default=Path("model-store"), metavar="FOLDER",
                        help="TorchServe's model store, from which certificates are read (%(default)s)")
    parser.add_argument("--watch", type=Path, default=Path(".ee-watch"), metavar="FOLDER",
                        help="the folder in which ee-watch keeps its decisions (%(default)s)")
    parser.add_argument("--switches", type=Path, metavar="FOLDER",
                        help="the folder in which ee-exits notes its changes; by default the folder "
                             f"{SWITCHES_FOLDER} beside the key file")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    parser.add_argument("--host-name", action="append", default=[], metavar="NAME",
                        help="a name of this machine that clients use, besides localhost and addresses; pass it once "
                             "for each name")
    parser.add_argument("--port", type=int, default=8090, help="the port to listen on (%(default)s)")
    parser.add_argument("--max-items", type=int, default=64, metavar="N",
                        help="the largest number of items in a message (%(default)s)")
    parser.add_argument("--max-bytes", type=int, default=10 * 2**20, metavar="N",
                        help="the largest size of an item, in bytes (%(default)s)")
    parser.add_argument("--in-flight", type=int, default=32, metavar="N",
                        help="the largest number of items of one connection that TorchServe processes at once "
                             "(%(default)s)")
    parser.add_argument("--in-flight-in-all", type=int, default=256, metavar="N",
                        help="the largest number of items of all connections that TorchServe processes at once "
                             "(%(default)s)")
    parser.add_argument("--max-bytes-in-all", type=int, default=128 * 2**20, metavar="N",
                        help="the largest size of all messages and answers that are held at once, in bytes; the "
                             "process may need six times as much memory (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the addresses as one line of JSON")
    return parser
