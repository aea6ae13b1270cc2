"""A reader who follows a document, command by command, in a folder of their own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from early_exit.archiver.torchserve.tokens import read_token
from tests.support.client import consecutive_free_ports
from tests.support.documents import Shown, commands

_OF_SERVER = {"ee-serve": "--port {port}", "ee-roll": "--port {port}", "ee-watch": "--server http://127.0.0.1:{port}",
              "ee-gateway": "--server http://127.0.0.1:{port}"}
HOME = "/home/me"


class Reader:
    """A reader who runs the commands of documents as they are shown, except that a server gets its own ports and that a
    test may replace parts of commands."""

    def __init__(self, *documents: Path, folder: Path, instead: Mapping[str, str], more: Mapping[str, str],
                 elsewhere: Mapping[str, str] | None = None) -> None:
        """Open documents.

        Args:
            documents: the documents to follow, one after the other.
            folder: the folder in which commands run.
            instead: replacements for parts of the commands.
            more: more options, by the beginnings of the commands that get them.
            elsewhere: parts of the commands that another test runs.
        """
        self.folder, self.port = folder, consecutive_free_ports()
        self.printed = ""
        """The first output of the last command that keeps running."""
        self._instead = {**instead, HOME: str(folder), "127.0.0.1:8080": f"127.0.0.1:{self.port}"}
        self._more = more
        self._steps = iter([one for document in documents for one in commands(document)
                            if not any(part in one.command for part in elsewhere or {})])

    def follow(self, beginning: str) -> Shown:
        """Return the next command of the documents, which must begin as given."""
        shown = next(self._steps)
        assert shown.command.startswith(beginning), f"expected {beginning} here, the documents have {shown.command}"
        return shown

    def check(self, beginning: str) -> str:
        """Run the next command, which must print what the document shows; return what it printed."""
        shown = self.follow(beginning)
        printed = self.run(shown)
        assert not (missing := shown.missing(printed)), (missing, printed)
        return printed

    def at_the_end(self) -> None:
        """Check that the documents have no more commands."""
        assert (left := next(self._steps, None)) is None, left

    def run(self, shown: Shown) -> str:
        """Run a command in a shell; return its output."""
        keys = self.folder / ".ee-serve" / "key_file.json"
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                       "KEY": read_token(keys, "inference") if keys.exists() else ""}
        done = subprocess.run(self._line(shown.command), shell=True, cwd=self.folder, env=environment, text=True,
                              capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, f"{shown.command}\n{done.stderr}"
        return self._as_told(done.stdout + done.stderr)

    @contextmanager
    def running(self, shown: Shown, more: str = "") -> Iterator[subprocess.Popen[str]]:
        """Start a command that runs until Ctrl-C, and check the lines of output that the document shows."""
        command = shlex.split(self._line(shown.command) + more)
        process = subprocess.Popen([Path(sys.executable).parent / command[0], *command[1:]], cwd=self.folder,
                                   stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            printed = "".join(process.stdout.readline() for _ in shown.output)
            assert not shown.missing(self._as_told(printed)), printed
            self.printed = printed
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait(60)
        assert status == 0

    def _line(self, command: str) -> str:
        line = command
        for said, meant in self._instead.items():
            line = line.replace(said, meant)
        options = [more for beginning, more in self._more.items() if command.startswith(beginning)]
        return " ".join([line, *options, _OF_SERVER.get(command.split()[0], "").format(port=self.port)])

    def _as_told(self, printed: str) -> str:
        """Return an output with the values of the documents in place of those of this run."""
        for said, meant in self._instead.items():
            printed = printed.replace(meant, said)
        return printed
