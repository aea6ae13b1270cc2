"""`ee-train`: build exits from what the handler recorded."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from early_exit.handler.errors import EarlyExitError
from early_exit.handler.head import HeadSpec
from early_exit.handler.layout import read_archive
from early_exit.training.dataset import find_shards
from early_exit.training.distill import Distillation
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import TrainingOptions, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ee-train`; return its exit status."""
    parser = argparse.ArgumentParser(
        "ee-train", description="Build early exits from recorded traffic: heads, temperatures, thresholds, a subset, "
        "and a certificate. A stopped run continues where it was.")
    parser.add_argument("records", type=Path, help="the records folder that ee-serve printed")
    parser.add_argument("--archive", type=Path, required=True, metavar="X.mar", help="the archive that was recorded")
    parser.add_argument("--tolerance", type=_fraction, default=0.02,
                        help="share of answers that may differ from the full model's (%(default)s)")
    parser.add_argument("--confidence", type=_fraction, default=0.95,
                        help="of the certificate (%(default)s)")
    parser.add_argument("--thresholds", choices=("certified", "paper", "equal"), default="certified",
                        help="with a guarantee, or by the paper's budgets T/2^n, or T/exits (%(default)s)")
    parser.add_argument("--to", type=Path, required=True, metavar="runs/NAME", help="folder of this run")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report for machines")
    options = parser.parse_args(arguments)
    asked = TrainingOptions(options.tolerance, options.confidence, options.thresholds, HeadSpec(),
                            Distillation(seed=options.seed))
    try:
        model, backbone = read_archive(options.archive)
        report = train(model, backbone, find_shards(options.records, model, backbone), asked, RunPaths(options.to),
                       lambda line: print(f"ee-train: {line}", file=sys.stderr))
    except EarlyExitError as error:
        print(f"ee-train: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.to_json(), indent=1) if options.json else report.to_text().rstrip())
    return 0


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, such as 0.02, found {text!r}")
    return value
