"""The page that lists the errors of the commands and of the workers, and what workers log, collected from the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from tests.support.documents import ROOT

FOLDERS = ("handler", "training", "archiver")
ROOTS = {"EarlyExitError", "NotExported", "Malformed"}
"""The base classes of the errors that users see. The last two occur inside a handler and for a WebSocket message."""
LOGGED, LEVELS = "In the log", ("warning", "error", "exception")
"""The kind of the messages that are logged at these levels."""
SOMETHING = "…"
"""A placeholder for the values that a message fills in."""

MESSAGES = """<!-- Written by `make docs` from the code: change the code, not this page. -->

# Error messages

These are the errors of the commands, of the workers and of the WebSocket, and what workers and the gateway log. `…`
stands for a name, a path, a number or the text of another error. Where a message does not say what to do,
[troubleshooting](troubleshooting.md) does. A wrong use of an option is reported together with the options of the
command.

{sections}
"""


ACTIONS = ("archive", "build", "call", "choose", "collect", "create", "delete", "export", "give", "install", "keep",
           "label", "leave", "let", "make", "move", "name", "pass", "put", "quantize", "record", "remove", "rename",
           "repackage", "roll", "run", "save", "scale", "see", "set", "stop", "train", "use")
"""The verbs with which a message tells its reader to do something."""
_INSTRUCTION = re.compile(rf"[:;.?] (?:if [^:;.,]*, )?(?:{'|'.join(ACTIONS)})\b(?! (?:is|are|has|of|was|were)\b)",
                          re.IGNORECASE)
_ENTRY = re.compile(r"^((?:`.+`\n)+):   ", re.MULTILINE)
"""The messages that one entry of the page on troubleshooting explains, each in a line of its own."""


def messages_page() -> str:
    """Return the page about error messages."""
    sections = []
    logged = (LOGGED, "These are warnings and errors of the workers, and one of the gateway.")
    for name, meaning in [*sorted(kinds().items()), logged]:
        lines = [f"- `{text}`" for own, text in messages() if own == name]
        if lines:
            sections.append("\n\n".join([f"## {name}", meaning, "\n".join(lines)]))
    return MESSAGES.format(sections="\n\n".join(sections))


@cache
def messages() -> list[tuple[str, str]]:
    """Return the messages that users may see: the kind, and the text with `SOMETHING` in place of filled-in values."""
    trees = [ast.parse(file.read_text()) for file in sources()]
    return sorted({(kind, re.sub(f"{SOMETHING}+", SOMETHING, text)) for tree in trees
                   for kind, text in (*messages_in(tree), *logged_in(tree)) if has_words(text)})


def instructs(text: str) -> bool:
    """Return whether a message itself says what to do: one of its sentences or clauses begins with a verb of `ACTIONS`.

    A clause begins after a colon, a semicolon, a full stop or a question mark. A condition may come first.

    >>> instructs("no records at x: record first"), instructs("cannot read x: record is damaged")
    (True, False)
    """
    return bool(_INSTRUCTION.search(text))


def explained(troubleshooting: str) -> list[str]:
    """Return the messages, or parts of messages, that a page on troubleshooting explains."""
    return [line.strip("`") for lines in _ENTRY.findall(troubleshooting) for line in lines.splitlines()]


def without_advice(troubleshooting: str) -> list[str]:
    """Return the messages that neither say what to do nor are explained on a page on troubleshooting."""
    parts = explained(troubleshooting)
    return [text for _, text in messages() if not instructs(text) and not any(part in text for part in parts)]


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


def logged_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the messages that a file logs, with `SOMETHING` in place of filled-in values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS and (
                getattr(node.func.value, "id", "") == "logger"):
            for text in texts_of(node.args[0], {}):
                yield LOGGED, " ".join(re.sub(r"%(?:\.\d+)?[sdf]", SOMETHING, text).split())


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
