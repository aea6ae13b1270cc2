"""Exact versions can be installed with each Python that the project admits, not only with the one of this machine."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.matrix import __main__ as matrix

ROOT = Path(__file__).parents[1]
INSTALLED = {"constraints.txt": sys.path,
             **{f"constraints-{name}.txt": [str(folder) for folder in (ROOT / ".venv" / name).glob(
                 "lib/python*/site-packages")] for name in ("checkov", "audit")}}
"""Where the packages are whose exact versions a file has. The last two environments are not made everywhere."""
PYTHONS = tuple(f"{python}.{patch}" for python in matrix.PYTHONS for patch in range(15))


@pytest.mark.parametrize("file", INSTALLED)
def test_a_version_is_pinned_for_no_python_that_it_does_not_support(file: str) -> None:
    ours = admitted()
    pins = [Requirement(line) for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    needed = {f"{canonicalize_name(found.metadata['Name'])}=={found.version}":
              SpecifierSet(found.metadata["Requires-Python"] or "") for found in distributions(path=INSTALLED[file])}
    known = {pin: needed[key] for pin in pins if (key := f"{canonicalize_name(pin.name)}{pin.specifier}") in needed}
    assert len(known) > 100 or file != "constraints.txt", "most of the packages are installed here"
    assert [f"{pin} with Python {python}" for pin, wanted in known.items() for python in PYTHONS
            if python in ours and python not in wanted and applies(pin, python)] == []


def admitted() -> SpecifierSet:
    """Return the Pythons that the project admits."""
    [ours] = re.findall(r'^requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return SpecifierSet(ours)


def test_exactly_the_pythons_that_the_matrix_tries_are_admitted_and_none_of_them_failed() -> None:
    minors = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}.9" in admitted()]
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert minors == classified == [*matrix.PYTHONS]
    runs = json.loads(matrix.RESULTS.read_text())["runs"]
    assert {run["python"] for run in runs} <= {*minors}
    assert [run for run in runs if run["torch"] and (run["handler"]["failed"] or run["round_trip"]["failed"])] == []


def applies(pin: Requirement, python: str) -> bool:
    """Return whether a pin applies to a Python, such as 3.11.5."""
    version = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    return pin.marker is None or pin.marker.evaluate({**default_environment(), **version})
