"""What is installed without the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("handler", "training", "archiver")


def test_a_wheel_has_every_module_the_page_and_the_type_markers(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building leaves files behind
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    tmp_path, source], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"early_exit/{path.relative_to(source)}" for package in PACKAGES
                for path in (source / package).rglob("*") if path.is_file()}
    assert expected <= names
    assert {f"early_exit/{package}/py.typed" for package in PACKAGES} <= names
    assert "early_exit/__init__.py" not in names, "the namespace must stay open for the copy inside archives"
