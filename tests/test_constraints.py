"""Exact versions can be installed with each Python that the project admits, not only with the one of this machine."""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
INSTALLED = {"constraints.txt": sys.path,
             **{f"constraints-{name}.txt": [str(folder) for folder in (ROOT / ".venv" / name).glob(
                 "lib/python*/site-packages")] for name in ("checkov", "audit")}}
"""Where the packages are whose exact versions a file has. The last two environments are not made everywhere."""
PYTHONS = tuple(f"3.{minor}.{patch}" for minor in range(10, 14) for patch in range(15))
"""Python 3.14 is not among them, because networkx excludes one of its releases."""


@pytest.mark.parametrize("file", INSTALLED)
def test_a_version_is_pinned_for_no_python_that_it_does_not_support(file: str) -> None:
    [ours] = re.findall(r'^requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    pins = [Requirement(line) for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    needed = {f"{canonicalize_name(found.metadata['Name'])}=={found.version}":
              SpecifierSet(found.metadata["Requires-Python"] or "") for found in distributions(path=INSTALLED[file])}
    known = {pin: needed[key] for pin in pins if (key := f"{canonicalize_name(pin.name)}{pin.specifier}") in needed}
    assert len(known) > 100 or file != "constraints.txt", "most of the packages are installed here"
    assert [f"{pin} with Python {python}" for pin, wanted in known.items() for python in PYTHONS
            if python in SpecifierSet(ours) and python not in wanted and applies(pin, python)] == []


def applies(pin: Requirement, python: str) -> bool:
    """Return whether a pin applies to a Python, such as 3.11.5."""
    version = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    return pin.marker is None or pin.marker.evaluate({**default_environment(), **version})
