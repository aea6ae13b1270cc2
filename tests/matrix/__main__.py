"""`make matrix`: the handler's tests and two serving round trips, with each Python and the oldest and newest torch.

It needs uv (`make matrix` installs it), which finds or fetches interpreters. Each environment is deleted after its run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from tests.benchmarks.report import commit_of_code
from tests.support.documents import ROOT

RESULTS = ROOT / "docs" / "versions.json"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
"""The versions that `requires-python` admits. A version that is not available is reported as not tried."""
OLDEST, NEWEST = "oldest", "newest"
EXTRAS = "serve,train,gateway,openvino,demo,test"
ROUND_TRIPS = [f"tests/end_to_end/test_serving.py::{name}" for name in (
    "test_two_workers_answer_and_record_every_request",
    "test_a_roll_under_load_loses_no_request_and_the_new_version_exits")]
"""Tests of a model that records, and of a model whose exits answer."""
_FOLLOWS_TORCH = ("torch", "torchvision", "triton", "nvidia-", "cuda-")
"""Prefixes of the packages whose versions depend on torch's, so our constraints do not apply to them."""


@dataclass(frozen=True)
class Outcome:
    """The results of one set of tests."""

    passed: int
    failed: tuple[str, ...]
    """Names of the tests that failed or could not be set up."""
    skipped: int


@dataclass(frozen=True)
class Run:
    """One combination of a Python and a torch."""

    python: str
    torch: str | None = None
    """The version that was installed; None if the environment could not be made."""
    torchvision: str | None = None
    handler: Outcome | None = None
    round_trip: Outcome | None = None
    seconds: int = 0
    date: str | None = None
    """The day of the run; None if it was not noted."""
    commit: str | None = None
    """The commit of the code, with a plus if there were other changes; None if it is not known."""
    not_tried: str | None = None
    """Why there are no results."""


def main() -> None:
    options = parser().parse_args()
    known = {(run["python"], run["wanted"]): run for run in json.loads(RESULTS.read_text())["runs"]} if (
        options.keep) else {}
    for python in options.python:
        for wanted in options.torch:
            run = tried(options.uv, python, wanted)
            known[python, wanted] = {"wanted": wanted, **asdict(run)}
            print(json.dumps(known[python, wanted]), flush=True)
            runs = sorted(known.values(), key=lambda one: (PYTHONS.index(one["python"]), one["wanted"] == NEWEST))
            RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def tried(uv: str, python: str, wanted: str) -> Run:
    """Make an environment, run the tests in it, and delete it."""
    started, began, commit = time.monotonic(), date.today().isoformat(), commit_of_code()
    with tempfile.TemporaryDirectory(prefix="matrix-") as scratch:
        folder = Path(scratch)
        interpreter = folder / "env" / "bin" / "python"
        for command, trouble in installation(uv, python, wanted, folder):
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return Run(python, not_tried=trouble)
        versions = dict(line.split("==", 1) for line in subprocess.run(
            [uv, "pip", "freeze", "--quiet", "--python", interpreter], text=True, capture_output=True,
            check=True).stdout.splitlines() if "==" in line)
        handler = outcome(interpreter, ["tests/handler"], folder)
        round_trip = outcome(interpreter, ROUND_TRIPS, folder)
        return Run(python, versions["torch"], versions["torchvision"], handler, round_trip,
                   round(time.monotonic() - started), began, commit)


def installation(uv: str, python: str, wanted: str, folder: Path) -> Iterator[tuple[list[str], str]]:
    """Yield the commands that make an environment with a Python and the oldest or newest torch that we admit. Each
    comes with what its failure means."""
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(line for line in (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
                                   if not line.startswith(_FOLLOWS_TORCH)))
    torch = [f"torch=={oldest_torch()}.*"] if wanted == OLDEST else ["torch"]
    yield [uv, "venv", "--quiet", "--python", python, str(folder / "env")], "this Python could not be had"
    yield [uv, "pip", "install", "--quiet", "--python", str(folder / "env" / "bin" / "python"),
           "--constraint", str(constraints), "--resolution", "highest", "--editable", f".[{EXTRAS}]",
           *torch], "the packages could not be installed"


def oldest_torch() -> str:
    """Return the oldest torch that pyproject.toml admits, such as 2.9."""
    [version] = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return str(version)


def outcome(interpreter: Path, tests: list[str], folder: Path) -> Outcome:
    """Run tests and count their results."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{interpreter.parent}:{os.environ['PATH']}"}
    done = subprocess.run([interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                           "--numprocesses", "auto", "--dist", "loadfile", *tests],
                          cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    if not report.exists():
        return Outcome(0, (f"pytest ended with status {done.returncode}: {last_line(done.stdout + done.stderr)}",), 0)
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [f"{case.get('classname')}::{case.get('name')}" for case in cases
           if case.find("failure") is not None or case.find("error") is not None]
    n_skipped = sum(case.find("skipped") is not None for case in cases)
    return Outcome(len(cases) - len(bad) - n_skipped, tuple(bad), n_skipped)


def last_line(text: str) -> str:
    """Return the last line that a program wrote."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.matrix", description=__doc__)
    parser.add_argument("--uv", default="uv", help="the program (%(default)s)")
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS, help="which (all)")
    parser.add_argument("--torch", nargs="+", choices=(OLDEST, NEWEST), default=(OLDEST, NEWEST), help="which (both)")
    parser.add_argument("--keep", action="store_true", help="keep the results of the other combinations")
    return parser


if __name__ == "__main__":
    main()
