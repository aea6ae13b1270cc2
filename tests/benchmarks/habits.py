"""Handlers with the habits of their authors, before and after: would a client notice that the archive was repackaged?

    python -m tests.benchmarks.habits --json FILE [--only NAME ...]

Each habit is an archive of the stock archiver. A stock TorchServe serves this archive and those that `ee-archive` makes
of it: without exits, and with exits, both with plain batching and with early answers. The heads of the exits are copies
of the rest of the model, so early answers must be equal too. Clients send the same requests to all of them, one after
the other and in batches. A different status, content type or body is wrong, and so is a missing answer. One habit is a
compiled library, which needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from early_exit.training.command import raise_on_terminate
from tests.benchmarks.report import report
from tests.support.habits.examples import EXAMPLES
from tests.support.habits.habit import Habit
from tests.support.habits.leaks import KINDS, worst_growth_mb
from tests.support.habits.refused import REFUSED
from tests.support.habits.requests import REQUESTS
from tests.support.habits.rows import ANSWERED, BATCHED, CALLED, COMPUTED, LOADED, WRAPPED
from tests.support.habits.trial import try_habits

HABITS = (*LOADED, *WRAPPED, *CALLED, *BATCHED, *ANSWERED, *COMPUTED, *EXAMPLES, *REQUESTS, *REFUSED)


def main() -> int:
    parser = argparse.ArgumentParser(description="Handlers before and after.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", nargs="*", choices=[habit.name for habit in HABITS], metavar="NAME")
    options = parser.parse_args()
    raise_on_terminate()
    habits = [habit for habit in HABITS if not options.only or habit.name in options.only]
    return report(options.json, lambda scratch: measured(habits, scratch), vars(options))


def measured(habits: Sequence[Habit], scratch: Path) -> dict[str, Any]:
    """Try habits; return the figures that the project is held to, and how wrong answers differ."""
    trials = try_habits(habits, scratch, log=_log)
    by_name = {trial.habit.name: trial for trial in trials}
    leaks = {"leaks_mb": round(worst_growth_mb(by_name, scratch, _log), 1)} if by_name.keys() >= KINDS.keys() else {}
    refused = [(trial.habit.name, trial.refused) for trial in trials if trial.refused]
    return {
        "habits": len(trials),
        "same": sum(trial.same for trial in trials),
        "wrong": [trial.habit.name for trial in trials if trial.wrong],
        "refused": [{"name": name, "reason": said.reason and said.reason.value, "message": said.message}
                    for name, said in refused],
        "refused_unlisted": sum(said.reason is None for _, said in refused),
        **leaks,
        "differences": {trial.habit.name: trial.wrong for trial in trials if trial.wrong},
    }


def _log(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
