"""The page that lists the errors of the commands and of the workers, collected from the places that raise them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from early_exit.handler import errors
from tests.support.documents import ROOT

FOLDERS = ("handler", "training", "archiver")
KINDS = {name: kind for name, kind in vars(errors).items()
         if isinstance(kind, type) and issubclass(kind, errors.EarlyExitError) and kind is not errors.EarlyExitError}
SOMETHING = "…"
"""A placeholder for the values that a message fills in."""

MESSAGES = """<!-- Written by `make docs` from the code: change the code, not this page. -->

# Error messages

Every error message says what was expected, what was found, where, and what to do. This page lists all of them. `…`
stands for a name, a path or a number. [Troubleshooting](troubleshooting.md) explains those that come up most often.

{sections}
"""


def messages_page() -> str:
    """Return the page about error messages."""
    found = sorted({(kind, text) for file in sources() for kind, text in messages_in(ast.parse(file.read_text()))})
    sections = []
    for name, kind in sorted(KINDS.items()):
        lines = [f"- `{text}`" for own, text in found if own == name]
        if lines:
            sections.append("\n\n".join([f"## {name}", (kind.__doc__ or "").strip(), "\n".join(lines)]))
    return MESSAGES.format(sections="\n\n".join(sections))


def sources() -> list[Path]:
    """Return the files whose errors users may see."""
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def messages_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the errors that a file makes: the kind, and the text with `SOMETHING` in place of filled-in values."""
    for node in ast.walk(tree):
        name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and name in KINDS and node.args:
            text = " ".join(text_of(node.args[0]).split())
            if text.replace(SOMETHING, "").strip(" :;,.()'"):
                yield name, text


def text_of(node: ast.expr) -> str:
    """Return the text of a string expression, with `SOMETHING` in place of unknown parts."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "without_credentials":
        return text_of(node.args[0])
    return SOMETHING
