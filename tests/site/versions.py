"""The page about supported versions, made from the results of `make matrix`."""

from __future__ import annotations

import json
from typing import Any

from tests.matrix.__main__ import NEWEST, OLDEST, PYTHONS, RESULTS
from tests.site.reference import table

VERSIONS = """<!-- Written by `make docs` from docs/versions.json, which `make matrix` writes. -->

# Supported versions

`make matrix` installs each Python with the oldest and the newest torch that `pyproject.toml` admits. It runs the
handler's tests and two round trips through a real TorchServe 0.12: with a version that records, and with one whose
exits answer. What does not work is not admitted by `pyproject.toml`.

{results}

{not_tried}
"""


def versions_page() -> str:
    """Return the page about supported versions."""
    results = json.loads(RESULTS.read_text())
    runs = [run for run in results["runs"] if run["torch"]]
    return VERSIONS.format(
        not_tried=not_tried(results["runs"]),
        results="There are no results yet." if not runs else table(
            ("Python", "torch", "torchvision", "the handler's tests", "serving round trips", "date", "commit"),
            ((run["python"], f"{run['torch']} ({run['wanted']})", run["torchvision"], in_words(run["handler"]),
              in_words(run["round_trip"]), run["date"] or "not noted", run["commit"] or "not noted") for run in runs)))


def in_words(outcome: dict[str, Any]) -> str:
    """Return the results of a set of tests in words, with the names of the tests that failed."""
    skipped = f", {outcome['skipped']} skipped" if outcome["skipped"] else ""
    failed = f", {len(outcome['failed'])} failed: {', '.join(outcome['failed'])}" if outcome["failed"] else ""
    return f"{outcome['passed']} passed{skipped}{failed}"


def not_tried(runs: list[dict[str, Any]]) -> str:
    """Return a sentence about the combinations without results."""
    found = {(run["python"], run["wanted"]): run for run in runs}
    missing = [f"Python {python} with the {wanted} torch" + (f" ({run['not_tried']})" if run else "")
               for python in PYTHONS for wanted in (OLDEST, NEWEST)
               if not (run := found.get((python, wanted))) or not run["torch"]]
    return f"Not tried: {', '.join(missing)}." if missing else "Nothing was left out."
