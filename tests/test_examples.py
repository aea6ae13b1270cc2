"""The examples in docstrings are true. Each module is imported once, by the name by which programs import it."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {path: path.read_text() for room in ("handler", "training", "archiver", "tests")
           for path in sorted((ROOT / room).rglob("*.py"))}
WITH_EXAMPLES = {".".join(path.relative_to(ROOT).with_suffix("").parts): text
                 for path, text in SOURCES.items() if re.search(r"^ +>>> ", text, re.MULTILINE)}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(name: str) -> None:
    assert "# doctest:" not in WITH_EXAMPLES[name], "an example that is left out, or compared loosely, proves nothing"
    module = importlib.import_module(name if name.startswith("tests.") else f"early_exit.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed
