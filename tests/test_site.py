"""The documentation site: generated pages match the code, and the site loads nothing from other hosts."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.site.__main__ import PAGES
from tests.site.messages import (
    LOGGED,
    SOMETHING,
    explained,
    has_words,
    instructs,
    logged_in,
    messages,
    messages_in,
    sources,
    texts_of,
    without_advice,
)
from tests.site.reference import PARSERS, attribute_docstrings, command, settings
from tests.support.documents import ROOT

TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
LOADED = {"src", "srcset", "poster", "data"}
"""HTML attributes that name files which a browser loads by itself, besides those in `link` elements."""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_that_is_made_from_the_code_is_what_the_code_gives(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "make docs writes it"


@dataclass(frozen=True)
class Settings:
    fast: bool = True
    """Whether it hurries."""
    limit_bytes: int = 3 * 2**30
    """The most
    that it takes."""


def test_a_setting_has_its_default_and_the_meaning_that_stands_below_it() -> None:
    assert attribute_docstrings(Settings) == {"fast": "Whether it hurries.", "limit_bytes": "The most that it takes."}
    assert settings(Settings).splitlines()[2:] == ["| `fast` | `true` | Whether it hurries. |",
                                                   "| `limit_bytes` | `3221225472` (3 GiB) | The most that it takes. |"]


def test_a_command_has_its_arguments_its_defaults_and_its_examples() -> None:
    parser = argparse.ArgumentParser("ee-do", description="Does it.", epilog="examples:\n  ee-do x")
    parser.add_argument("what", metavar="WHAT", help="the thing")
    parser.add_argument("--how", choices=("well", "badly"), default="well", help="the way (%(default)s)")
    text = command(parser)
    assert "| `WHAT` | the thing |" in text and "| `--how HOW` | the way (well); one of well, badly |" in text
    assert text.startswith("## ee-do\n\nDoes it.\n\n```\nee-do WHAT [options]\n```") and "```\nee-do x\n```" in text


@pytest.mark.parametrize("parser", [make() for make in PARSERS], ids=lambda parser: parser.prog)
def test_an_example_in_a_commands_help_is_a_use_of_the_command(parser: argparse.ArgumentParser) -> None:
    """`ee-watch status` takes the options of `ee-watch`, whose parser does not know the word."""
    others = tuple(other.prog for other in (make() for make in PARSERS) if other.prog.startswith(f"{parser.prog} "))
    lines = [line.strip() for line in (parser.epilog or "").replace("\\\n", " ").splitlines()]
    examples = [line for line in lines if re.match(r"([A-Z_]+=\S+ )*ee-\w+( |$)", line)]
    assert examples
    for example in examples:
        assert f"{parser.prog} " in f"{example} ", example
        if not example.startswith((*others, "ee-watch status ")):
            parser.parse_args(shlex.split(example.partition(parser.prog)[2]))


def test_a_message_is_found_with_its_gaps_and_its_alternatives_however_it_is_written() -> None:
    source = """
raise ConfigError(f"{name} is no key{' here' if here else ''}: " + did_you_mean(name)) from error
raise LoadingError(why(error))
raise ValueError("not ours")
def why(error): return f"{error} happened"
def checked(name, refused=ArchiveError): raise refused("a bad name")
"""
    assert {*messages_in(ast.parse(source))} == {
        ("ConfigError", f"{SOMETHING} is no key here: {SOMETHING}"),
        ("ConfigError", f"{SOMETHING} is no key: {SOMETHING}"),
        ("LoadingError", f"{SOMETHING} happened"), ("ArchiveError", "a bad name")}


def test_a_message_in_the_log_is_found_with_gaps_for_its_values() -> None:
    source = 'logger.warning("%d of %.1f %s" " fail", n, m, what)\nlogger.info("no")\nother.error("no")'
    assert [*logged_in(ast.parse(source))] == [(LOGGED, f"{SOMETHING} of {SOMETHING} {SOMETHING} fail")]


def test_only_errors_that_pass_on_other_errors_have_no_words_on_the_page() -> None:
    without = {file.name for file in sources() for _, text in messages_in(ast.parse(file.read_text()))
               if not has_words(text)}
    assert without == {"fleet.py", "labels.py", "served.py"}, "let tests/site/messages.py find the text of the error"


@cache
def said() -> str:
    """Return every message, and every string of the code except docstrings, one per line, with gaps for the values that
    are filled in."""
    nodes = [node for file in sources() for node in ast.walk(ast.parse(file.read_text()))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    strings = [text for node in nodes if isinstance(node, (ast.JoinedStr, ast.BinOp, ast.Constant))
               and id(node) not in docstrings for text in texts_of(node, {})]
    return "\n".join(" ".join(text.split()) for text in (*strings, *(text for _, text in messages())))


@pytest.mark.parametrize("message", explained(TROUBLESHOOTING))
def test_every_message_that_is_explained_is_still_in_the_code(message: str) -> None:
    assert message in said()


def test_for_every_message_it_is_said_what_to_do() -> None:
    assert len(messages()) > 300
    assert without_advice(TROUBLESHOOTING) == [], "say it in the message, or in docs/troubleshooting.md"


def test_a_message_whose_entry_is_deleted_is_noticed() -> None:
    for message in explained(TROUBLESHOOTING):
        needed = {text for _, text in messages() if message in text and not instructs(text)}
        others = [part for part in explained(TROUBLESHOOTING) if part != message]
        needed = {text for text in needed if not any(part in text for part in others)}
        assert {*without_advice(TROUBLESHOOTING.replace(f"`{message}`\n", "", 1))} == needed, message


@pytest.mark.parametrize(("text", "told"), [
    ("x is none of ours: pass --secret FILE", True), ("x is too large. If it is yours, archive it as a .mar", True),
    ("was its roll interrupted? Remove it", True), ("x has died: see the logs in y", True),
    ("cannot copy the model in x: Permission denied", False), ("expected tensors, found none", False),
    ("cannot read x: is the archive damaged?", False), ("no secret at x: ee-serve makes it when it starts", False),
    ("the archive has no use for it; record of x", False), ("did someone else roll?", False)])
def test_an_instruction_is_told_from_a_fact_and_from_a_question(text: str, told: bool) -> None:
    assert instructs(text) is told


class Loads(HTMLParser):
    """A parser that collects the addresses which a browser loads by itself for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(values.get("href", ""))
        self.addresses += [value for name, value in values.items() if name in LOADED]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site and return its folder. Any warning is an error, such as one about a broken link or a page outside
    the navigation."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], cwd=ROOT,
                           env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, text=True, capture_output=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {page.stem: page for page in site.glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= pages.keys()
    for page in pages.values():
        loads = Loads()
        loads.feed(page.read_text())
        assert len(loads.addresses) > 3
        assert [address for address in loads.addresses if re.match(r"(\w+:)?//", address)] == [], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text()), sheet.name
