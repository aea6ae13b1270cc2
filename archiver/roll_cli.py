"""`ee-roll`: bring a new model version into service on one server or on several."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from early_exit.archiver.fleet import add_server_options, roll_all, servers_of
from early_exit.archiver.roll import LONGEST_BATCH_S
from early_exit.archiver.server import raise_on_terminate
from early_exit.handler.errors import EarlyExitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ee-roll`; return its exit status."""
    parser = argparse.ArgumentParser(
        "ee-roll", description="Bring a new model version into service without losing a request.")
    parser.add_argument("archive", type=Path, metavar="FILE.mar", help="an archive in the server's model store")
    add_server_options(parser)
    parser.add_argument("--put-back", action="store_true",
                        help="when a server fails, roll the version before into those that are done")
    parser.add_argument("--request", type=Path,
                        help="body of a request that the new version must answer first; by default its own sample")
    parser.add_argument("--longest-batch-s", type=float, default=LONGEST_BATCH_S, metavar="S",
                        help="how long the old version may take for one batch (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report for machines")
    options = parser.parse_args(arguments)
    raise_on_terminate()
    try:
        request = options.request.read_bytes() if options.request else None
        reports = roll_all(servers_of(options), options.archive, put_back=options.put_back, request=request,
                           longest_batch_s=options.longest_batch_s, say=lambda line: print(line, file=sys.stderr))
    except (EarlyExitError, OSError) as error:
        print(f"ee-roll: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ee-roll: interrupted", file=sys.stderr)
        return 1
    for report in reports:
        instead = f" instead of {report.replaced}" if report.replaced else ""
        print(json.dumps(asdict(report)) if options.json else f"{report.model} {report.version} serves{instead}")
    return 0
