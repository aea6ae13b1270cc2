"""Tests back what the page on security says: the tests that it names exist, and every line that needs one has one."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from early_exit.archiver.gateway.messages import Limits
from early_exit.archiver.torchserve.cli import parser as serve_parser
from early_exit.handler.config import ServingConfig
from early_exit.training.environment import MORE_VARIABLES
from tests.support.documents import DOCUMENTS, ROOT

PAGE = ROOT / "docs" / "security.md"
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^`]+)\])?`")
"""A reference to a test: its file, its name and, for a test with parameters, the ID of one case."""


@cache
def cases_of(file: Path) -> dict[str, set[str]]:
    """Return the tests that pytest finds in a file, each with the strings in its decorators."""
    return {node.name: {part.value for decorator in node.decorator_list for part in ast.walk(decorator)
                        if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def missing_tests(text: str) -> list[str]:
    """Return the tests that a text names but that do not exist."""
    return [f"{file}::{name}" + (f"[{case}]" if case else "") for file, name, case in _TEST.findall(text)
            if not (ROOT / file).exists() or name not in cases_of(ROOT / file)
            or (case and case not in cases_of(ROOT / file)[name])]


def lines_that_need_tests(text: str) -> list[str]:
    """Return the lines of the tables whose last column names the tests that hold each line."""
    found, inside = [], False
    for line in text.splitlines():
        inside = line.startswith("|") and (inside or line.endswith("| held by |"))
        if inside and not line.endswith("| held by |") and not line.startswith("|---"):
            found.append(line)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    assert missing_tests(document.read_text()) == []


def test_a_test_that_is_not_there_would_be_found() -> None:
    here, case = "tests/test_security.py", "tests/training/test_service_attacked.py"
    page = "test_code_that_a_page_sends_through_the_browser_is_not_run"
    assert missing_tests(f"`{here}::test_gone` `tests/gone.py::test_it` `{case}::{page}[page]` `{case}::{page}[gone]` "
                         f"`{here}::lines_that_need_tests`") == [
        f"{here}::test_gone", "tests/gone.py::test_it", f"{case}::{page}[gone]", f"{here}::lines_that_need_tests"]


def test_every_line_on_who_may_do_what_names_a_test() -> None:
    lines = lines_that_need_tests(PAGE.read_text())
    assert len(lines) > 20
    assert [line for line in lines if not _TEST.search(line.rsplit(" | ", 1)[1])] == []


def test_every_command_is_on_the_page_about_code() -> None:
    first_columns = " ".join(line.split("|")[1] for line in lines_that_need_tests(PAGE.read_text()))
    told = set(re.findall(r"`(ee-\w+)", first_columns))
    scripts = re.findall(r"^(ee-\w+) =", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert told == set(scripts)
    assert f"`{MORE_VARIABLES}`" in PAGE.read_text()


def test_records_are_kept_as_long_as_the_page_for_operators_says() -> None:
    text = " ".join((ROOT / "docs" / "operate.md").read_text().split())
    [(gib, days)] = re.findall(r"deleted at (\d+) GiB \(`records_max_bytes`\) or after (\d+) days", text)
    assert (int(gib) * 2**30, int(days) * 24 * 3600) == (
        ServingConfig.records_max_bytes, ServingConfig.records_max_age_s)


def test_the_gateway_holds_no_more_than_its_page_says() -> None:
    text = " ".join((ROOT / "docs" / "live-page.md").read_text().split())
    for pattern, limit in ((r"when (\d+) others are open", Limits.connections),
                           (r"holds (\d+) MiB of messages", Limits.bytes_in_all / 2**20),
                           (r"At most (\d+) items of one connection", Limits.in_flight),
                           (r"and (\d+) of all connections, are processed at once", Limits.in_flight_in_all)):
        [told] = re.findall(pattern, text)
        assert int(told) == limit, pattern


def test_tokens_last_as_long_as_the_manifest_and_the_page_for_operators_say() -> None:
    manifests = yaml.safe_load_all((ROOT / "docs" / "kubernetes" / "torchserve.yaml").read_text())
    [stateful] = [manifest for manifest in manifests if manifest["kind"] == "StatefulSet"]
    server = stateful["spec"]["template"]["spec"]["containers"][0]
    asked = serve_parser().parse_args([*server["command"][1:], *server["args"]])
    told = " ".join((ROOT / "docs" / "kubernetes.md").read_text().split())
    [days] = re.findall(r"`--token-minutes`, here (\d+) days", told)
    assert asked.token_minutes == int(days) * 24 * 60


def test_a_hole_that_is_left_open_is_of_a_pinned_package_and_has_a_reason_and_no_other_is_ignored() -> None:
    lines = [line for line in (ROOT / "ignored-advisories.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for line in lines:
        advisory, package, reason = line.split(maxsplit=2)
        assert re.fullmatch(r"(CVE|GHSA|PYSEC)-[\w-]+", advisory) and package in pinned and len(reason) > 20, line
    [command] = [line for line in subprocess.run(
        ["make", "--dry-run", "--always-make", "audit"], cwd=ROOT, text=True, capture_output=True, timeout=60,
        check=True).stdout.replace("\\\n", "").splitlines() if "pip-audit --strict" in line]
    assert re.findall(r"--ignore-vuln (\S+)", command) == [line.split()[0] for line in lines]
