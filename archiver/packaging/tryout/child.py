"""Runs programs with a user's code in separate processes, where the code may print, hang or crash."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from early_exit.handler import errors
from early_exit.handler.errors import ArchiveError, EarlyExitError, Unsupported
from early_exit.training.environment import MORE_VARIABLES, minimal_environment

LIMIT_S = 600.0
"""How long a model may take to be loaded, exported and tried out."""
_SHOWN = 2000
"""The number of characters from the end of a program's output that a message shows."""
_LAUNCHER = Path(__file__).with_name("launcher.py")
_running: list[Launcher] = []
"""The launcher of this process, while there is one."""


class Launcher:
    """The process from which try-outs are forked; it is started for the first of them.

    It has a minimal environment and finds installed packages only.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def close(self) -> None:
        """End the process, with the processes that it has forked."""
        if self._process is not None:
            self._process.communicate()

    def run(self, program: Path, argument: Path, scratch: Path, limit_s: float) -> int | None:
        """Run a program and return its exit status; None if it is killed after the limit.

        Args:
            program: the file of the program.
            argument: the argument of the program.
            scratch: a folder; the program prints into the files `output` and `errors` in it.
            limit_s: how long the program may take.

        Raises:
            ArchiveError: the launcher does not start.
        """
        if self._process is None:
            self._process = subprocess.Popen([sys.executable, "-I", str(_LAUNCHER)], env=minimal_environment(),
                                             text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        request = {"program": str(program), "arguments": [str(argument)], "environment": minimal_environment(),
                   "output": str(scratch / "output"), "errors": str(scratch / "errors")}
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            process = json.loads(self._process.stdout.readline())["process"]
        except (OSError, ValueError) as error:
            raise ArchiveError("torch and TorchServe cannot be imported in the process that tries archives out; its "
                               "errors are shown above") from error
        in_time = bool(select.select([self._process.stdout], [], [], limit_s)[0])
        if not in_time:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        status: int = json.loads(self._process.stdout.readline())["status"]
        return status if in_time else None


@contextlib.contextmanager
def launcher() -> Iterator[Launcher]:
    """Keep one launcher until the block ends; a nested block uses the launcher of the outer block."""
    if _running:
        yield _running[0]
        return
    _running.append(Launcher())
    try:
        yield _running[0]
    finally:
        _running.pop().close()


def run_child(program: Path, job: Mapping[str, Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Run a program that calls `answer_parent`, and return what its work returned.

    The process has a minimal environment: it knows no secrets of the user's, and no folder to record into.

    Args:
        program: the file of the program; it imports installed packages only, nothing from the current folder or
            PYTHONPATH.
        job: the input of the program's work, as JSON.
        what: the name of the work in messages, such as "the new archive".
        limit_s: how long the program may take.

    Raises:
        EarlyExitError: as the work raised it.
        ArchiveError: the program crashed or took too long; the message ends with its output.
    """
    with tempfile.TemporaryDirectory() as folder, launcher() as started:
        scratch = Path(folder)
        asked, told = scratch / "job.json", scratch / "result.json"
        asked.write_text(json.dumps({**job, "result": str(told)}))
        status = started.run(program, asked, scratch, limit_s)
        printed = _printed(scratch)
        if status is None:
            raise ArchiveError(f"{what} did not load and answer within {limit_s:.0f} s{printed}")
        if not told.exists():
            raise ArchiveError(f"{what} does not run: its process ended with status {status}{printed}")
        result = json.loads(told.read_text())
    return _value_of(result, printed)


def answer_parent(work: Callable[[dict[str, Any]], Any]) -> None:
    """Do the work that `run_child` asks for, report the result, and end this process with all of its threads.

    Args:
        work: a function that takes the job and returns a value that JSON can hold.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    result = _result_of(lambda: work(job))
    scratch = Path(job["result"] + ".part")
    scratch.write_text(json.dumps(result))
    scratch.replace(job["result"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class LoadingError(ArchiveError):
    """The user's code failed; its output says more."""


def in_a_fork(work: Callable[[], Any]) -> Any:
    """Do some work in a fork of this process, which has none of its other threads, and return the result.

    Args:
        work: a function that returns a value that JSON can hold.

    Raises:
        EarlyExitError: as the work raised it.
        LoadingError: the fork crashed.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        told = ""
        try:
            told = json.dumps(_result_of(work))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            with os.fdopen(writing, "w") as pipe:
                pipe.write(told)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(process, 0)
    if not told:
        raise LoadingError(f"its process crashed with status {status}")
    return _value_of(json.loads(told), "")


def _result_of(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except EarlyExitError as error:
        return {"error": str(error), "kind": type(error).__name__, "shows_output": isinstance(error, LoadingError),
                "unsupported": error.unsupported and error.unsupported.value}


def _value_of(result: Mapping[str, Any], printed: str) -> Any:
    if "error" not in result:
        return result["value"]
    kind = LoadingError if result["shows_output"] else getattr(errors, result["kind"], ArchiveError)
    unsupported = result["unsupported"] and Unsupported(result["unsupported"])
    raise kind(result["error"] + (printed if result["shows_output"] else ""), unsupported)


def _printed(folder: Path) -> str:
    files = [folder / "output", folder / "errors"]
    text = "\n".join(file.read_text(errors="replace") for file in files if file.exists()).strip()
    return (f" (if its code needs an environment variable of yours, name it in {MORE_VARIABLES})"
            + (f":\n{text[-_SHOWN:]}" if text else ""))
