"""Which rooms of `archiver` may import the one for TorchServe, and which modules must not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ARCHIVER = Path(__file__).parents[2] / "archiver"
COMMANDS = {"cli.py", "__main__.py"}


def imported(file: Path) -> set[str]:
    """Return the rooms of `archiver` that a file imports."""
    modules = {node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)}
    return {module.split(".")[2] for module in modules if module.startswith("early_exit.archiver.")}


def test_only_commands_know_which_server_it_is() -> None:
    files = [file for file in ARCHIVER.rglob("*.py") if file.parent.name != "torchserve"]
    assert {file.name for file in files if "torchserve" in imported(file)} <= COMMANDS
    told = {file for file in files if "key_file.json" in file.read_text() or "/models" in file.read_text()}
    assert not told, "its paths and its key file are its own room's"


def test_the_gateway_and_the_watcher_do_not_import_each_other() -> None:
    for room, other in (("gateway", "watch"), ("watch", "gateway")):
        assert not [file for file in (ARCHIVER / room).glob("*.py") if other in imported(file)]


@pytest.mark.parametrize("module", ["gateway.app", "gateway.asgi_server", "torchserve.management", "torchserve.cli"])
def test_what_runs_beside_the_server_loads_no_torch(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import early_exit.archiver.{module}, sys; print('torch' in "
                           "sys.modules)"], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "False", done.stderr
