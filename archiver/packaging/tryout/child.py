"""Programs that run a user's code in a process of their own, where it may print, hang or crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from early_exit.handler import errors
from early_exit.handler.errors import ArchiveError, EarlyExitError, Unsupported
from early_exit.training.environment import MORE_VARIABLES, minimal_environment

LIMIT_S = 600.0
"""How long a model may take to be loaded, exported and tried out."""
_SHOWN = 2000
"""Characters of what a program printed that a message ends with."""


def run_child(program: Path, job: Mapping[str, Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Run a program that calls `answer_parent`, and return what its work returned.

    The process has a minimal environment: it knows no secrets of the user's, and no folder to record into.

    Args:
        program: a file; it finds installed packages only, nothing of the current folder or PYTHONPATH.
        job: what the program's work is given, as JSON.
        what: names the work in messages, such as "the new archive".
        limit_s: how long it may take.

    Raises:
        EarlyExitError: as the work raised it.
        ArchiveError: it crashed or took too long; the message ends with what the program printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, told = Path(scratch) / "job.json", Path(scratch) / "result.json"
        asked.write_text(json.dumps({**job, "result": str(told)}))
        try:
            run = subprocess.run([sys.executable, "-I", str(program), str(asked)], env=minimal_environment(),
                                 capture_output=True, text=True, errors="replace", timeout=limit_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise ArchiveError(f"{what} did not load and answer within {limit_s:.0f} s"
                               f"{_printed(error.stdout, error.stderr)}") from None
        if not told.exists():
            raise ArchiveError(f"{what} does not run: its process ended with status {run.returncode}"
                               f"{_failed(run.stdout, run.stderr)}")
        result = json.loads(told.read_text())
    if "error" in result:
        kind = getattr(errors, result["kind"], ArchiveError)
        unsupported = result["unsupported"] and Unsupported(result["unsupported"])
        raise kind(result["error"] + (_failed(run.stdout, run.stderr) if result["shows_output"] else ""), unsupported)
    return result["value"]


def answer_parent(work: Callable[[dict[str, Any]], Any]) -> None:
    """Do the work that `run_child` asks for, tell it the result, and end this process, whatever threads it has.

    Args:
        work: takes the job and returns what JSON can hold.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = {"value": work(job)}
    except EarlyExitError as error:
        result = {"error": str(error), "kind": type(error).__name__, "shows_output": isinstance(error, LoadingError),
                  "unsupported": error.unsupported and error.unsupported.value}
    scratch = Path(job["result"] + ".part")
    scratch.write_text(json.dumps(result))
    scratch.replace(job["result"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class LoadingError(ArchiveError):
    """The user's code failed; what it printed says more."""


def _failed(*streams: str | bytes | None) -> str:
    return f" (where its code misses a variable of yours, name that in {MORE_VARIABLES}){_printed(*streams)}"


def _printed(*streams: str | bytes | None) -> str:
    text = "\n".join(stream.decode(errors="replace") if isinstance(stream, bytes) else stream
                     for stream in streams if stream).strip()
    return f":\n{text[-_SHOWN:]}" if text else ""
