"""The pages about settings and commands, made from the code that reads them."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from importlib import import_module
from itertools import pairwise
from typing import Any

from early_exit.archiver.gateway.cli import parser as gateway_parser
from early_exit.archiver.packaging.cli import parser as archive_parser
from early_exit.archiver.packaging.cli import show_parser
from early_exit.archiver.rollout.cli import parser as roll_parser
from early_exit.archiver.switch.cli import parser as exits_parser
from early_exit.archiver.torchserve.cli import parser as serve_parser
from early_exit.archiver.watch.cli import parser as watch_parser
from early_exit.handler.config import ServingConfig
from early_exit.training.cli import parser as train_parser
from early_exit.training.cli import report_parser
from early_exit.training.heads.space import SearchSpace
from early_exit.training.options import TrainingOptions

PARSERS: tuple[Callable[[], argparse.ArgumentParser], ...] = (
    archive_parser, show_parser, serve_parser, train_parser, report_parser, roll_parser, watch_parser, exits_parser,
    gateway_parser)
VARIABLES = {"handler.protocol": "RECORDS_VARIABLE SECRET_VARIABLE",
             "handler.exits.switch": "SWITCHES_VARIABLE", "archiver.torchserve.server_config": "CONFIG_VARIABLE",
             "training.environment": "MORE_VARIABLES GATEWAY_TOKEN"}
"""The constants that name environment variables. Keys are modules."""
KINDS = {"positional arguments": "argument", "options": "option"}
"""Column titles for the groups that every parser has. Keys are argparse's names of the groups."""
GENERATED = "<!-- Written by `make docs` from the code: change the code, not this page. -->\n\n"

CONFIGURATION = GENERATED + """# Configuration reference

## Serving: the `early_exit:` block

The block `early_exit:` of `model-config.yaml` configures one version of a model. The file is part of
the archive, and `ee-archive --config FILE` replaces it. An unknown key and a value that is out of range are errors that
name the key.

```yaml
minWorkers: 1
maxWorkers: 1
batchSize: 8
early_exit:
  sampling_rate: 0.1
  records_max_age_s: 604800
```

{serving}

## Training: the options of a run

`ee-train` writes these options into `report.json`. `training/options.py` defines them for Python programs.

{training}

## The search space

`ee-train --space FILE.yaml` takes a file with the keys below. A key that the file leaves out keeps its default. Each
value is a list, except `heads`.

{space}

## Environment variables

{variables}
"""

COMMANDS = GENERATED + """# Command reference

Every command explains itself with `--help`. Results go to standard output, messages and progress to standard error.
`--json` prints the result for programs. The exit status is 0 after success, 1 after a failure that a message explains,
and 2 after a mistake on the command line. `--print-completion` prints a completion script for a shell. A value in
parentheses at the end of a description is the default.

{commands}
"""


def configuration_page() -> str:
    """Return the page about settings."""
    return CONFIGURATION.format(serving=settings(ServingConfig), training=settings(TrainingOptions),
                                space=settings(SearchSpace), variables=variables())


def commands_page() -> str:
    """Return the page about commands."""
    return COMMANDS.format(commands="\n\n".join(command(parser()) for parser in PARSERS))


def settings(kind: type) -> str:
    """Return the fields of a dataclass as a table. Each field must have a docstring of its own."""
    meanings = attribute_docstrings(kind)
    return table(("key", "default", "meaning"), ((f"`{part.name}`", default_of(part), meanings[part.name])
                                                 for part in fields(kind)))


def default_of(part: Any) -> str:
    """Return a field's default as it is written in YAML. Large sizes and ages are also given in a larger unit."""
    value = part.default_factory() if part.default_factory is not MISSING else part.default
    if value is None or value == {}:
        return "none"
    if hasattr(value, "__dataclass_fields__"):
        plain = {inner.name: told for inner in fields(value)
                 if isinstance(told := getattr(value, inner.name), int | float | str)}
        return ", ".join(f"{name} `{told}`" for name, told in plain.items()) or "see [below](#the-search-space)"
    if isinstance(value, tuple):
        return ", ".join(f"`{yaml_of(one)}`" for one in value)
    large = {"_bytes": (2**30, "GiB"), "_age_s": (24 * 3600, "days")}
    for ending, (unit, name) in large.items():
        if part.name.endswith(ending):
            return f"`{yaml_of(value)}` ({value / unit:g} {name})"
    return f"`{yaml_of(value)}`"


def yaml_of(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def attribute_docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings below the attributes of a class. Keys are attribute names."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    return dict(_docstrings(node.body))


def _docstrings(body: list[ast.stmt]) -> Iterable[tuple[str, str]]:
    for before, after in pairwise(body):
        targets = [before.target] if isinstance(before, ast.AnnAssign) else getattr(before, "targets", [])
        if targets and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            for name in ast.walk(targets[0]):
                if isinstance(name, ast.Name):
                    yield name.id, " ".join(str(after.value.value).split())


def variables() -> str:
    """Return a table of the environment variables that we read, with the docstring of each."""
    rows = []
    for module, names in VARIABLES.items():
        loaded = import_module(f"early_exit.{module}")
        meanings = dict(_docstrings(ast.parse(inspect.getsource(loaded)).body))
        rows += [(f"`{getattr(loaded, name)}`", meanings[name]) for name in names.split()]
    return table(("variable", "meaning"), sorted(rows))


def command(parser: argparse.ArgumentParser) -> str:
    """Return the section about a command: what it does, its arguments, and examples."""
    positional = [action for action in parser._actions if not action.option_strings]
    required = [action for action in parser._actions if action.option_strings and action.required]
    synopsis = " ".join([parser.prog, *(shown(action) for action in (*positional, *required)), "[options]"])
    parts = [f"## {parser.prog}", " ".join((parser.description or "").split()), f"```\n{synopsis}\n```"]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest not in ("help", "print_completion")]
        if actions:
            title = str(group.title)
            parts += [*([] if title in KINDS else [f"**{title.capitalize()}**"]),
                      table((KINDS.get(title, "option"), "meaning"),
                            ((f"`{shown(action)}`", meaning(parser, action)) for action in actions))]
    examples = (parser.epilog or "").removeprefix("examples:\n")
    return "\n\n".join([*parts, f"Examples:\n\n```\n{textwrap.dedent(examples).rstrip()}\n```"])


def shown(action: argparse.Action) -> str:
    """Return an argument as a user types it, with a placeholder for its value."""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.nargs == 0:
        return action.option_strings[-1]
    value = {"+": f"{metavar} [{metavar} ...]", "*": f"[{metavar} ...]", "?": f"[{metavar}]"}.get(
        str(action.nargs), metavar)
    return f"{action.option_strings[-1]} {value}" if action.option_strings else value


def value_of(choice: object) -> str:
    return str(choice.value if isinstance(choice, Enum) else choice)


def meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return an argument's help with its values filled in."""
    values: Mapping[str, Any] = {**vars(action), "prog": parser.prog,
                                 "choices": ", ".join(map(value_of, action.choices or ()))}
    text = (action.help or "") % {name: value_of(value) for name, value in values.items()}
    unnamed = [choice for choice in map(value_of, action.choices or ()) if choice not in text]
    return text + (f"; one of {', '.join(map(value_of, action.choices or ()))}" if unnamed else "")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)
