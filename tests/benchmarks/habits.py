"""Habits of those who write handlers, before and after: would a client notice that the archive was repackaged?

    python -m tests.benchmarks.habits --json FILE [--only NAME ...]

Each habit is an archive of the stock archiver. A stock TorchServe serves it, and what `ee-archive` makes of it: without
exits, and with exits whose heads are copies of what follows, so that early answers must be equal too, as plain and as
early answers. Clients ask all of them the same, one request after the other and in batches. Another status, content
type or body, or no answer, is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from early_exit.training.command import raise_on_terminate
from tests.benchmarks.report import report
from tests.support.habits.examples import EXAMPLES
from tests.support.habits.refused import REFUSED
from tests.support.habits.rows import ANSWERED, BATCHED, CALLED, COMPUTED, LOADED, WRAPPED
from tests.support.habits.trial import Outcome, try_habits

HABITS = (*LOADED, *WRAPPED, *CALLED, *BATCHED, *ANSWERED, *COMPUTED, *EXAMPLES, *REFUSED)


def main() -> int:
    parser = argparse.ArgumentParser(description="Handlers before and after.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", nargs="*", choices=[habit.name for habit in HABITS], metavar="NAME")
    options = parser.parse_args()
    raise_on_terminate()
    habits = [habit for habit in HABITS if not options.only or habit.name in options.only]
    return report(options.json, lambda scratch: summary(try_habits(
        habits, scratch, log=lambda line: print(time.strftime("%H:%M:%S"), line, flush=True))))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the figures that the project is held to, and how the wrong ones differ."""
    refused = [(outcome.habit.name, outcome.refused) for outcome in outcomes if outcome.refused]
    return {
        "habits": len(outcomes),
        "same": sum(outcome.same for outcome in outcomes),
        "wrong": [outcome.habit.name for outcome in outcomes if outcome.wrong],
        "refused": [{"name": name, "reason": refusal.reason and refusal.reason.value, "message": refusal.message} for name, refusal in refused],
        "refused_unlisted": sum(refusal.reason is None for _, refusal in refused),
        "differences": {outcome.habit.name: outcome.wrong for outcome in outcomes if outcome.wrong},
    }


if __name__ == "__main__":
    sys.exit(main())
