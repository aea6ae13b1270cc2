"""What the commands have in common: help with examples, shell completion, and how they end."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Callable

import shtab

from early_exit.handler.errors import EarlyExitError
from early_exit.training.credentials import without_credentials


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples and which prints completion scripts for shells.

    Args:
        name: of the command.
        description: what it does.
        examples: command lines, each after a line that says what it is for.
    """
    parser = argparse.ArgumentParser(
        name, description=textwrap.fill(description, 100), formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "))
    if " " not in name:  # of subcommands shells would ask the command itself
        shtab.add_argument_to(parser, "--print-completion", help="print a completion script for this shell, and exit")
    return parser


def run_command(name: str, work: Callable[[], int], *, when_interrupted: str = "interrupted") -> int:
    """Do a command's work; return its exit status: 0 done, 1 failed with a message, and 2, by argparse, misused."""
    try:
        return work()
    except (EarlyExitError, OSError) as error:
        log_to_stderr(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: {when_interrupted}", file=sys.stderr)
    return 1


def raise_on_terminate() -> None:
    """Let SIGTERM and a closed terminal unwind like Ctrl-C, so that what was started is stopped.

    Ctrl-C is named too: a shell starts background commands with SIGINT ignored, and Python leaves it so.
    """
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def log_to_stderr(line: str) -> None:
    """Print a line for the user at once, without the credentials of the URLs in it."""
    print(without_credentials(line), file=sys.stderr, flush=True)


def print_next(command: str) -> None:
    """Tell a person, not a program that reads the output, which command comes next."""
    print(f"next: {command}", file=sys.stderr)
