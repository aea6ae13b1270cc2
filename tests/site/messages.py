"""The page that lists the errors of the commands and of the workers, collected from the places that raise them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from tests.support.documents import ROOT

FOLDERS = ("handler", "training", "archiver")
ROOTS = {"EarlyExitError", "NotExported", "Malformed"}
"""The base classes of the errors that users see. The last two occur inside a handler and for a WebSocket message."""
SOMETHING = "…"
"""A placeholder for the values that a message fills in."""

MESSAGES = """<!-- Written by `make docs` from the code: change the code, not this page. -->

# Error messages

These are the errors of the commands, of the workers and of the WebSocket. `…` stands for a name, a path, a number or
the text of another error. [Troubleshooting](troubleshooting.md) explains those that come up most often, and what to do.
A wrong use of an option is reported together with the options of the command.

{sections}
"""


def messages_page() -> str:
    """Return the page about error messages."""
    trees = [ast.parse(file.read_text()) for file in sources()]
    found = sorted({(kind, text) for tree in trees for kind, text in messages_in(tree) if has_words(text)})
    sections = []
    for name, meaning in sorted(kinds().items()):
        lines = [f"- `{text}`" for own, text in found if own == name]
        if lines:
            sections.append("\n\n".join([f"## {name}", meaning, "\n".join(lines)]))
    return MESSAGES.format(sections="\n\n".join(sections))


def sources() -> list[Path]:
    """Return the files whose errors users may see."""
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


@cache
def kinds() -> dict[str, str]:
    """Return the names of the errors that users see, and what each of them means: `ROOTS` and their subclasses."""
    classes = [node for file in sources() for node in ast.walk(ast.parse(file.read_text()))
               if isinstance(node, ast.ClassDef)]
    known = set(ROOTS)
    while more := {node.name for node in classes if known & {getattr(base, "id", "") for base in node.bases}} - known:
        known |= more
    return {node.name: " ".join((ast.get_docstring(node) or "").split()) for node in classes if node.name in known}


def messages_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the errors that a file makes: the kind, and the text with `SOMETHING` in place of filled-in values.

    An error with alternatives yields each of them. A text that a function of the same file returns is followed. Where a
    parameter says which error is raised, the error is of the kind of its default.
    """
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for scope in [tree, *functions.values()]:
        names = chosen_kinds(scope) if isinstance(scope, ast.FunctionDef) else {name: name for name in kinds()}
        for node in ast.walk(scope):
            if isinstance(node, ast.Call) and node.args and (kind := names.get(getattr(node.func, "id", ""))):
                for text in texts_of(node.args[0], functions):
                    yield kind, " ".join(text.split())


def chosen_kinds(function: ast.FunctionDef) -> dict[str, str]:
    """Return the parameters of a function whose value is an error class, and the class that is their default."""
    defaults = zip(reversed(function.args.args), reversed(function.args.defaults))
    return {parameter.arg: default.id for parameter, default in defaults
            if isinstance(default, ast.Name) and default.id in kinds()}


def has_words(text: str) -> bool:
    """Return whether a message has words of its own, rather than only those of another error."""
    return bool(text.replace(SOMETHING, "").strip(" :;,.()'"))


def texts_of(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """Return the texts that a string expression can have, with `SOMETHING` in place of unknown parts.

    Args:
        node: the expression.
        functions: the functions whose results are followed, by name.
    """
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.IfExp):
        return texts_of(node.body, functions) + texts_of(node.orelse, functions)
    if isinstance(node, (ast.JoinedStr, ast.BinOp)):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
        if isinstance(node, ast.JoinedStr) or isinstance(node.op, ast.Add):
            return ["".join(chosen) for chosen in product(*(texts_of(part, functions) for part in parts))]
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, (ast.IfExp, ast.Constant)):
        return texts_of(node.value, functions)
    if isinstance(node, ast.Call):
        called = getattr(node.func, "id", "")
        if called == "without_credentials":
            return texts_of(node.args[0], functions)
        if called in functions:
            rest = {name: function for name, function in functions.items() if name != called}
            return [text for found in ast.walk(functions[called]) if isinstance(found, ast.Return) and found.value
                    for text in texts_of(found.value, rest)]
    return [SOMETHING]
