"""The paper's tables with this project's figures: accuracy, disagreement, hits, cost of all methods on the same data.

    python -m tests.benchmarks.paper --json FILE [--subjects resnet18 resnet56 efficientnet]

Each method chooses its exits with the recorded requests only. Each row is measured on requests that were not used for
choosing. Costs are CPU times of one thread compared with the plain backbone on the same engine, interleaved, with the
server's allocator. Baselines get the same records and replays of them, and also labels. Every budget and every number
of layers has a row. If a subject or a method is left out, its row says why. A row of a network that the paper reports
has the paper's figures under `paper`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.errors import ConfigError, EarlyExitError
from tests.benchmarks.bench import BATCH, Bench
from tests.benchmarks.methods import BUDGETS, LAYER_COUNTS, METHODS, Terms
from tests.benchmarks.report import conditions, save
from tests.benchmarks.rows import row
from tests.benchmarks.subjects import SUBJECTS
from tests.support.cifar import DataMissing

EXPECTED = (DataMissing, EarlyExitError)
"""The errors because of which a subject or a method may be left out."""
CURVES = ("exits", "at_common_thresholds")
"""The columns for the paper's Table 2 and Figures 2 to 4. They would make a file twenty times as long."""


def main() -> int:
    parser = argparse.ArgumentParser(description="The paper's tables in this project's numbers.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--subjects", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help="rows to measure (all of %(choices)s)")
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS, metavar="SHARE", help="(%(default)s)")
    parser.add_argument("--trials", type=int, default=20, help="of the search for each layer (%(default)s)")
    parser.add_argument("--measured", type=int, metavar="N", help="measure the first N requests (all)")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="write rows with exits and curves there, too")
    parser.add_argument("--work", type=Path, metavar="FOLDER",
                        help="keep heads and training sets there: a run of the same code that was stopped goes on "
                             "with them")
    options = parser.parse_args()
    restart_with_allocator()
    run = conditions({**vars(options), "batch": BATCH, "layer_counts": LAYER_COUNTS, "threads_of_model_times": 1})
    if options.work:
        run["settings"]["resumed"] = is_resumed(options.work, run)
    rows: list[dict[str, Any]] = []
    for name in options.subjects:
        with tempfile.TemporaryDirectory() as scratch:
            kept = options.work / name if options.work else Path(scratch)
            for one in rows_of(name, Path(scratch), kept, options):
                rows.append(one)
                short = [{key: value for key, value in each.items() if key not in CURVES} for each in rows]
                print(json.dumps(short[-1]), flush=True)
                save(options.json, run, {"rows": short})
                if options.curves:
                    save(options.curves, run, {"rows": rows})
    return 0


def is_resumed(folder: Path, run: Mapping[str, Any]) -> bool:
    """Tell whether a folder of kept work comes from an earlier run, and note in a new one which run it comes from.

    Raises:
        ConfigError: the earlier run had other code, another torch, another processor or another number of trials, so
            that a table would mix two runs.
    """
    about = {name: run[name] for name in ("commit", "torch", "processor")} | {"trials": run["settings"]["trials"]}
    noted = folder / "run.json"
    if not noted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(about))
        return False
    if (earlier := json.loads(noted.read_text())) != about:
        raise ConfigError(f"{folder} holds the work of another run: expected {about}, found {earlier}; pass another "
                          "folder")
    return True


def rows_of(name: str, scratch: Path, kept: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of each method on a subject. If a row cannot be measured, it says why, and the others follow."""
    try:
        subject = SUBJECTS[name](scratch)
        bench = Bench.prepare(subject, kept, options.trials)
    except EXPECTED as error:
        yield {"backbone": name, "left_out": str(error)}
    else:
        n = options.measured or len(subject.inputs)
        yield from measured_rows(bench, subject.inputs[:n], subject.truth[:n], options.methods, options.budgets)


def measured_rows(bench: Bench, inputs: Tensor, truth: Tensor, methods: Collection[str],
                  budgets: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Yield the rows of some methods.

    Args:
        bench: what the methods choose with.
        inputs: the inputs of the measured requests, (M, ...).
        truth: the true classes of the measured requests, (M,).
        methods: the names of the methods.
        budgets: the budgets that the methods are given.
    """
    with torch.no_grad():
        full = torch.cat([bench.subject.backbone.graph(batch) for batch in inputs.split(250)])
    for name in methods:
        for terms in METHODS[name].terms(bench, budgets):
            bench.say(f"{name}, budget {terms.budget}, layers {terms.layers or 'all'}")
            yield attempt(bench, name, terms, inputs, truth, full)


def attempt(bench: Bench, name: str, terms: Terms, inputs: Tensor, truth: Tensor, full: Tensor) -> dict[str, Any]:
    """Return the measured row, or a row that says why it could not be measured."""
    subject = bench.subject
    about = {"backbone": subject.name, "data": subject.data, "method": name}
    try:
        choice = METHODS[name].choose(bench, terms)
    except EXPECTED as error:
        return {**about, "tolerance": terms.budget, "left_out": str(error)}
    published = {"paper": subject.published.to_json()} if subject.published else {}
    about |= {**choice.about, "certify_accuracy": bench.certify_accuracy}
    return {**about, **row(subject.backbone, choice.exits, inputs, truth, full), **published}


if __name__ == "__main__":
    sys.exit(main())
