"""`ee-roll`: bring a new model version into service on one server or on several."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from early_exit.archiver.packaging.sources.form import add_form_option
from early_exit.archiver.packaging.sources.sample import samples_of
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.retiring import LONGEST_BATCH_S
from early_exit.archiver.torchserve.server_options import add_server_options, servers_of
from early_exit.training.command import command_parser, log_to_stderr, raise_on_terminate, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-roll`; return its exit status."""
    options = parser().parse_args(argv)
    raise_on_terminate()
    return run_command("ee-roll", lambda: _roll(options))


def _roll(options: argparse.Namespace) -> int:
    requests = samples_of([options.request] if options.request else [], options.content_type, options.form)
    reports = roll_all(servers_of(options), options.archive, name=options.name, put_back=options.put_back,
                       request=requests[0] if requests else None, untried=options.untried,
                       longest_batch_s=options.longest_batch_s, log=log_to_stderr)
    for report in reports:
        instead = f" instead of {report.replaced}" if report.replaced else ""
        print(json.dumps(asdict(report)) if options.json else f"{report.model} {report.version} serves{instead}")
    warnings = [report.warning for report in reports if report.warning]
    for warning in warnings:
        log_to_stderr(f"ee-roll: warning: {warning}")
    return 1 if warnings else 0


def add_longest_batch(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how long a version may take for its last batch."""
    parser.add_argument("--longest-batch-s", type=float, metavar="S",
                        help="the longest time in seconds that the old version takes for one batch; required if the "
                             "server's secret is not known; otherwise the time is measured too, and the larger one "
                             f"counts ({LONGEST_BATCH_S:.0f})")


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-roll`'s command line."""
    parser = command_parser("ee-roll", "Bring a new model version into service without losing a request.", """
        into the server that ee-serve started here:
          ee-roll model-store/cifar-3.0.mar
        into two others, one after the other; if one fails, both get their old version again:
          ee-roll model-store/cifar-3.0.mar --server http://10.0.0.7:8080 --server http://10.0.0.8:8080 \\
                  --tokens keys.json --put-back
        in place of a model that is registered under another name than its archive's:
          ee-roll model-store/cifar-3.0.mar --as photos""")
    parser.add_argument("archive", type=Path, metavar="FILE.mar",
                        help="the archive, in the server's model store, that ee-archive or torch-model-archiver made")
    add_server_options(parser)
    parser.add_argument("--as", dest="name", metavar="NAME",
                        help="the name of the model on the server, where it differs from the name in the archive")
    parser.add_argument("--put-back", action="store_true",
                        help="if a server fails, put the previous version back on all servers that have the new one")
    parser.add_argument("--request", type=Path, metavar="FILE",
                        help="the body of a request that the new version must answer first; by default the sample "
                             "request of its archive")
    add_form_option(parser)
    parser.add_argument("--content-type", metavar="TYPE",
                        help="the content type of the body; by default the file name tells it")
    parser.add_argument("--untried", action="store_true",
                        help="let the new version serve without having answered a sample request, if none is known")
    add_longest_batch(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser
