"""The source distribution, and the wheel that is built from it, work without the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from early_exit.handler.allocator import ALLOCATOR

ROOT = Path(__file__).parents[1]
PACKAGES = ("handler", "training", "archiver")
COMMANDS = {"ee-archive", "ee-train", "ee-serve", "ee-roll", "ee-watch", "ee-gateway", "ee-exits"}
STARTED = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, command
import early_exit.archiver.gateway.app, early_exit.training.__main__
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("early_exit.")), sep="\\n")
"""
"""A program that runs commands in one process, so that torch is imported once, and prints where our modules are."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a source distribution of the files of the repository."""
    folder = tmp_path_factory.mktemp("sources")
    source = folder / "source"  # building leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "site"))
    subprocess.run([sys.executable, "-c", "import sys, setuptools.build_meta as built; built.build_sdist(sys.argv[1])",
                    folder], cwd=source, check=True, capture_output=True)
    [built] = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that pip has built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    folder, sources], check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


def test_a_source_distribution_has_the_code_and_what_users_read_but_no_tests(sources: Path) -> None:
    with tarfile.open(sources) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    linked = set(re.findall(r"\]\(([^):#]+)[)#]", (ROOT / "README.md").read_text()))
    assert {"README.md", "CITATION.cff", "SECURITY.md", "LICENSE", "pyproject.toml", *linked} <= names
    assert "docs/benchmarks.md" in linked
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert {*PACKAGES} <= folders and "tests" not in folders, "tests do not work without all their files"


def test_a_wheel_has_every_module_the_page_and_the_type_markers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"early_exit/{path.relative_to(ROOT)}" for package in PACKAGES
                for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert expected <= names
    assert {f"early_exit/{package}/py.typed" for package in PACKAGES} <= names
    assert "early_exit/__init__.py" not in names, "the namespace must stay open for the copy inside archives"


@pytest.mark.slow
def test_every_command_starts_from_an_installed_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
                   check=True, capture_output=True)
    # PYTHONPATH comes before what is installed for the interpreter, such as the repository itself.
    # Commands do not restart if the allocator's variables are already set.
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": str(site)}
    commands = sorted((site / "bin").iterdir())
    assert {command.name for command in commands} == COMMANDS
    started = subprocess.run([sys.executable, "-c", STARTED, *commands], cwd=elsewhere, env=environment,
                             capture_output=True, text=True, timeout=300, check=False)
    assert started.returncode == 0, started.stderr
    lines = started.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("usage: ")] == [command.name for command in commands]
    files = [line for line in lines if line.endswith(".py")]
    assert len(files) > 50 and all(Path(file).is_relative_to(site) for file in files), files
