"""The parts that all commands share: help with examples, shell completion, and exit statuses."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import textwrap
import time
from collections.abc import Callable

import shtab

from early_exit.handler.errors import EarlyExitError
from early_exit.training.credentials import without_credentials

_PATIENCE_S = 60.0
"""How long a command may take to stop what it has started. A server gets 30 seconds."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and names with hyphens such as `torch-model-archiver` in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples and which prints completion scripts for shells.

    Args:
        name: the name of the command.
        description: what the command does.
        examples: command lines, each after a line that says what it is for.
    """
    parser = argparse.ArgumentParser(
        name, description=textwrap.fill(description, 100, break_on_hyphens=False), formatter_class=_HelpFormatter,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "))
    if " " not in name:  # shells ask the command itself to complete its subcommands
        shtab.add_argument_to(parser, "--print-completion", help="print a completion script for this shell, and exit")
    return parser


def run_command(name: str, work: Callable[[], int], *, when_interrupted: str = "interrupted") -> int:
    """Do a command's work and return its exit status: 0 for success, 1 for a failure that is reported.

    argparse exits with 2 where the command is misused.
    """
    try:
        return work()
    except (EarlyExitError, OSError) as error:
        log_to_stderr(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: {when_interrupted}", file=sys.stderr)
    return 1


def raise_on_terminate() -> None:
    """Let SIGTERM and a closed terminal unwind like Ctrl-C, so that everything the command started is stopped.

    SIGINT gets a handler, too: a shell starts background commands with SIGINT ignored, and Python leaves it ignored.
    A closed terminal is ignored where `nohup` asks for it. After a signal, the others are ignored for a minute: a
    second one would leave a server running, or a roll half taken back. Later ones are for a command that hangs.
    """
    ignored_until = -math.inf

    def interrupt(number: int, frame: object) -> None:
        nonlocal ignored_until
        if time.monotonic() >= ignored_until:
            ignored_until = time.monotonic() + _PATIENCE_S
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)


def log_to_stderr(line: str) -> None:
    """Print a line for the user immediately, without the credentials in its URLs."""
    print(without_credentials(line), file=sys.stderr, flush=True)


def print_next(command: str) -> None:
    """Tell a person, not a program that reads the output, which command comes next."""
    print(f"next: {command}", file=sys.stderr)
