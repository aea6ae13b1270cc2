"""The documents are right about options, settings and files, and their commands are run."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from markdown.extensions.toc import slugify
from model_archiver.model_archiver_config import ModelArchiverConfig

from early_exit.archiver.gateway.cli import parser as gateway_parser
from early_exit.archiver.packaging.cli import parser as archive_parser
from early_exit.archiver.packaging.cli import show_parser
from early_exit.archiver.rollout.cli import parser as roll_parser
from early_exit.archiver.switch.cli import parser as exits_parser
from early_exit.archiver.torchserve.cli import addresses_of
from early_exit.archiver.torchserve.cli import parser as serve_parser
from early_exit.archiver.watch.cli import parser as watch_parser
from early_exit.handler.engines.registry import ENGINES
from early_exit.training.cli import parser as train_parser
from early_exit.training.cli import report_parser
from tests.support import documents
from tests.support.documents import DOCUMENTS, PAGES, README, ROOT, blocks, commands, table

OUTSIDE_THE_SITE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
"""Pages whose links MkDocs does not check."""


@pytest.mark.parametrize("document", [*OUTSIDE_THE_SITE, *PAGES], ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    linked = [document.parent / target for target in re.findall(r"\]\(([^):#]+)[)#]", text)]
    named = [ROOT / target for target in re.findall(r"`((?:docs|tests|handler|archiver|training)/[\w./-]+)`", text)]
    modules = [ROOT / Path(*module.split(".")) for module in re.findall(r"python -m (tests\.[\w.]+)", text)]
    for path in (*linked, *named):
        assert path.exists(), f"{document.name} names {path.relative_to(ROOT)}"
    for path in modules:
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{document.name} runs {path}"


@pytest.mark.parametrize("document", OUTSIDE_THE_SITE, ids=lambda path: path.name)
def test_every_section_that_a_page_outside_the_site_links_is_there(document: Path) -> None:
    for page, section in re.findall(r"\]\(([^):#]+\.md)#([^)]+)\)", document.read_text()):
        headings = re.findall(r"^#+ (.+)$", (document.parent / page).read_text(), re.MULTILINE)
        assert section in {slugify(heading, "-") for heading in headings}, f"{document.name} links {page}#{section}"


def test_the_readme_is_short_and_has_what_decides_installs_and_leads_on() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert {"Install", "Is it for you?", "Two commands", "The loop", "What is guaranteed", "Documentation"} <= {
        *sections}
    assert re.search(r"^!\[", text, re.MULTILINE) and "| with exits" in text and "| the paper's exits" in text
    assert "make install" in sections["Install"] and "make demo" in sections["Install"]
    told = {name: re.findall(r"^\$ (ee-\w+)", section, re.MULTILINE) for name, section in sections.items()}
    assert told["Two commands"] == ["ee-archive", "ee-roll"]
    assert told["The loop"] == ["ee-archive", "ee-serve", "ee-train", "ee-archive", "ee-roll", "ee-watch"]
    assert [page.name for page in PAGES if page.name != "index.md" and f"(docs/{page.name}" not in text] == []


def test_every_page_with_commands_is_followed_to_its_end_by_a_test() -> None:
    """The README's commands are those of pages, as another test says."""
    followed: list[Path] = []
    for file in (ROOT / "tests" / "end_to_end").glob("test_*.py"):
        for test in ast.walk(ast.parse(file.read_text())):
            readers = [node for node in ast.walk(test) if isinstance(node, ast.Call)
                       and getattr(node.func, "id", "") == "Reader"] if isinstance(test, ast.FunctionDef) else []
            assert not readers or "reader.at_the_end()" in ast.unparse(test)
            followed += [getattr(documents, ast.unparse(argument).removeprefix("documents."))
                         for reader in readers for argument in reader.args]
    assert sorted(followed) == [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("document", [*OUTSIDE_THE_SITE, *PAGES], ids=lambda path: path.name)
def test_every_target_of_make_that_a_document_names_is_there(document: Path) -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    code = [*blocks(document), *re.findall(r"`([^`\n]+)`", document.read_text())]
    told = {name for text in code for name in re.findall(r"(?:^|&& )make (?:-C \S+ )?([a-z]+)\b", text, re.MULTILINE)}
    assert told <= {*phony.split()}


def test_the_architecture_page_names_every_room_once() -> None:
    rows = [line.split("|")[1] for line in (ROOT / "docs" / "architecture.md").read_text().splitlines()
            if line.startswith("| `") and "what it holds" not in line]
    named = [path.rstrip("/") for row in rows for path in re.findall(r"`((?:handler|training|archiver)/[\w./]*)`", row)]
    rooms = [str(path.relative_to(ROOT)) for folder in ("handler", "training", "archiver")
             for path in (ROOT / folder).iterdir()
             if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists()]
    assert sorted(named) == sorted(rooms)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


KNOWN = {"ee-archive": options_of(archive_parser()) | options_of(show_parser()), "ee-serve": options_of(serve_parser()),
         "ee-train": options_of(train_parser()) | options_of(report_parser()), "ee-roll": options_of(roll_parser()),
         "ee-watch": options_of(watch_parser()), "ee-gateway": options_of(gateway_parser()),
         "ee-exits": options_of(exits_parser()),
         "torch-model-archiver": {"--" + field.name.replace("_", "-") for field in fields(ModelArchiverConfig)}}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_that_a_document_names_is_there(document: Path) -> None:
    """An option after a command must be one of that command; an option on its own may be one of any command."""
    text = document.read_text()
    lines = [line.removeprefix("$ ") for block in blocks(document) for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    known = set().union(*KNOWN.values())
    for code in (*lines, *inline):
        command = code.split()[0] if code.split() else ""
        if command in KNOWN or command.startswith("--"):
            told = set(re.findall(r"(?<!\S)--[\w-]+", code.partition("#")[0]))
            assert told <= KNOWN.get(command, known), f"{document.name}: {code}"


def test_the_loops_options_are_those_of_training_with_their_defaults() -> None:
    told = table(ROOT / "docs" / "loop.md", "option")
    assert len(told) > 5 and {option for row in told for option in re.findall(r"--[\w-]+", row)} <= KNOWN["ee-train"]
    for action in train_parser()._actions:
        if action.option_strings and isinstance(action.default, int | str) and action.option_strings[-1] in told:
            default = {False: "off"}.get(action.default, getattr(action.default, "value", action.default))
            assert told[action.option_strings[-1]][0].strip("`") == str(default), action.dest


def test_the_citation_names_the_version_its_date_and_the_licence_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    told = {key: re.findall(rf'^{key} = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
            for key in ("version", "license")}
    assert {key: [citation[key]] for key in told} == told
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"## {citation['version']} - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()


FETCHED = re.compile(r"""
    (?:(?:pip[\dx.]*|\buv(?:\ tool|\ pip)?)['",]*\s[^;`]{0,80}\b(?:install|download|wheel|run|add)\b
    [^;`]{0,160}?[\s'"`=]early[-_.]exit[-_.]torchserve(?![\w/-])   # a command that has an index look the name up
    | early[-_.]exit[-_.]torchserve\s*[\[=<>~!@])      # a requirement, as such commands and files of them take
    (?!\[?[\w,]*\]?\s*@?\s*git\+)                       # but not if it says from which Git address
""", re.VERBOSE | re.IGNORECASE)
"""The name of our package where an installer would look it up in the public index, which does not have our package."""


def fetched(text: str) -> list[str]:
    """Return the parts of a text that would fetch our package by its name, even across ends of lines and strings."""
    joined = re.sub(r"""["']\s*\n\s*[frb]*["']""", "", text)
    return [match.group() for paragraph in re.split(r"\n\s*\n", joined)
            for match in FETCHED.finditer(re.sub(r"\s+", " ", paragraph))]


@pytest.mark.parametrize(("text", "n"), [
    ("pip install 'early-exit-" "torchserve[gateway]'", 1), ("uv add early-exit-" "torchserve", 1),
    ("python3.11 -m pip install\n--upgrade --index-url https://index.example early_exit_" "torchserve", 1),
    ('"needs it: "\n  f"pip install early-exit-"\n  "torchserve"', 1),
    ("pipx install early-exit-" "torchserve", 1), ("early-exit-" "torchserve >= 0.2", 1),
    ("pip install '.[gateway]'", 0), ("pip install ./early-exit-" "torchserve", 0),
    ("pip install '/src[serve]'\n\nuse the version of early-exit-" "torchserve that wrote it", 0),
    ("pip install git+https://git.example/early-exit-" "torchserve", 0),
    ("pip install 'early-exit-" "torchserve[serve] @ git+https://git.example/it'", 0),
    ("pip install 'early-exit-" "torchserve @ git+https://git.example/it'", 0),
    ("pip install 'early-exit-" "torchserve[serve] @ https://index.example/it'", 1),
    ('name = "early-exit-' 'torchserve"', 0)])
def test_what_would_fetch_our_name_from_an_index_is_noticed(text: str, n: int) -> None:
    assert len(fetched(text)) == n


def test_nothing_tells_a_user_to_fetch_our_name_from_the_public_index() -> None:
    """The name in the index is not ours, so anyone who registers it could run code on the machines of our users."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 300
    found = {str(file.relative_to(ROOT)): fetched(file.read_bytes().decode(errors="replace")) for file in files}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_prometheus_scrapes_where_ee_serve_shows_metrics_by_default() -> None:
    [job] = yaml.safe_load((ROOT / "docs" / "prometheus.yml").read_text())["scrape_configs"]
    options = serve_parser().parse_args([])
    metrics = addresses_of(options).metrics
    [[target]] = [one["targets"] for one in job["static_configs"]]
    assert (f"http://{target}", job["metrics_path"]) == (metrics, "/metrics")


def test_the_page_on_engines_describes_each() -> None:
    assert table(ROOT / "docs" / "engines.md", "engine").keys() == ENGINES.keys()
