"""`ee-serve`: TorchServe, by default on loopback, with the right Java, allocator, tokens and metrics."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.server_config import CONFIG_VARIABLE
from early_exit.training.command import command_parser, log_to_stderr, raise_on_terminate, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-serve` until Ctrl-C; return its exit status."""
    options = parser().parse_args(argv)
    raise_on_terminate()
    return run_command("ee-serve", lambda: _serve(options))


def _serve(options: argparse.Namespace) -> int:
    server = TorchServe(
        options.model_store, options.state, addresses_of(options), records=options.records,
        models=[Path(model).name for model in options.models], token_minutes=options.token_minutes,
        threads=options.threads, config=_config(options), log=log_to_stderr)
    try:
        with server:
            places = {"inference": server.addresses.inference, "management": server.addresses.management,
                      "metrics": f"{server.addresses.metrics}/metrics",
                      **{f"grpc_{kind}": address for kind, address in server.grpc_addresses.items()},
                      "tokens": str(server.key_file), "secret": str(server.secret_file),
                      "records": str(options.records.resolve()), "switches": str(server.switches)}
            if options.json:
                print(json.dumps(places), flush=True)
            else:
                lines = [f"{name:15}  {place}" for name, place in places.items()]
                print(*lines, "Ctrl-C stops it", sep="\n", flush=True)
            return server.wait()
    except KeyboardInterrupt:
        return 0


def _config(options: argparse.Namespace) -> Path | None:
    """Return the configuration file: that of --config, or else the one that TorchServe takes from the environment."""
    given: Path | None = options.config
    named = os.environ.get(CONFIG_VARIABLE)
    if named and given is None:
        log_to_stderr(f"{CONFIG_VARIABLE} names the configuration: {named}")
        return Path(named)
    if named:
        log_to_stderr(f"{CONFIG_VARIABLE}={named} is ignored, because --config is {given}")
    return given


def addresses_of(options: argparse.Namespace) -> Addresses:
    """Return the addresses on which the server will listen."""
    return Addresses.of_interfaces(options.host, options.management_host, options.metrics_host, options.port)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-serve`'s command line."""
    parser = command_parser("ee-serve", "Start TorchServe. Ctrl-C stops the server and its workers.", """
        ee-serve cifar-2.0.mar
        two workers of a model on four cores, on other ports:
          ee-serve cifar-2.0.mar --threads 2 --port 9080
        with the settings that you have for TorchServe:
          ee-serve cifar-2.0.mar --config config.properties""")
    parser.add_argument("models", nargs="*", metavar="FILE.mar",
                        help="names of archives in the model store to load at the start")
    parser.add_argument("--model-store", type=Path, default=Path("model-store"), metavar="FOLDER",
                        help="the only folder from which archives are loaded (%(default)s)")
    parser.add_argument("--records", type=Path, default=Path("records"), metavar="FOLDER",
                        help="the folder for the records (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path(".ee-serve"), metavar="FOLDER",
                        help="the folder for tokens, switches of the exits, logs and temporary files (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST",
                        help="the address for predictions; traffic is not encrypted, so put TLS in front of any "
                             "address but loopback (%(default)s)")
    parser.add_argument("--management-host", default="127.0.0.1", metavar="HOST",
                        help="the address for ee-roll and ee-watch; anyone who reaches it with the management token "
                             "decides what is served (%(default)s)")
    parser.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST",
                        help="the address for Prometheus; reading metrics needs no token (%(default)s)")
    parser.add_argument("--port", type=int, default=8080,
                        help="the port for inference; management and metrics use the next two ports (%(default)s)")
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="TorchServe's config.properties; ee-serve overrides the settings that it decides itself "
                             f"and reports each (the file in {CONFIG_VARIABLE}, if that is set)")
    parser.add_argument("--token-minutes", type=int, metavar="N",
                        help="how long tokens are valid, in minutes (the value in the configuration, else 60)")
    parser.add_argument("--threads", type=int, metavar="N",
                        help="the number of threads of one worker; by default half the cores")
    parser.add_argument("--json", action="store_true", help="print the addresses as one line of JSON")
    return parser
