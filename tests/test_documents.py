"""What the documents say of options, settings and files is so."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from early_exit.handler.config import ServingConfig
from early_exit.handler.engine import ENGINES
from early_exit.training.cli import _parser as train_parser
from tests.support.documents import DOCUMENTS, README, ROOT, table


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    linked = [document.parent / target for target in re.findall(r"\]\(([^):#]+)\)", text)]
    named = [ROOT / target for target in re.findall(r"`((?:docs|tests|handler|archiver|training)/[\w./-]+)`", text)]
    modules = [ROOT / Path(*module.split(".")) for module in re.findall(r"python -m (tests\.[\w.]+)", text)]
    for path in (*linked, *named):
        assert path.exists(), f"{document.name} names {path.relative_to(ROOT)}"
    for path in modules:
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{document.name} runs {path}"


def test_the_readme_lists_every_setting_with_its_default() -> None:
    told = table(README, "key")
    assert told.keys() == {field.name for field in fields(ServingConfig)}
    for field in fields(ServingConfig):
        if field.default is not None and not isinstance(field.default, float) and field.name != "records_max_bytes":
            expected = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
            assert told[field.name][0].strip("`") == expected, field.name


def test_the_readme_names_options_that_there_are() -> None:
    known = {option for action in train_parser()._actions for option in action.option_strings}
    told = {re.match(r"--[\w-]+", row).group() for row in table(README, "option")}  # type: ignore[union-attr]
    assert len(told) > 5 and told <= known


def test_the_readme_describes_every_engine() -> None:
    assert table(README, "engine").keys() == ENGINES.keys()
