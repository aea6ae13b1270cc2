"""The shape of the tree: imports point one way, and archives are not shadowed by an installed copy."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "handler": {"handler"},
    "training": {"handler", "training"},
    "archiver": {"handler", "training", "archiver"},
}
IN_A_WORKER = {"torch", "safetensors", "ts"}
"""What the handler may import besides the standard library: all that stock TorchServe needs is safetensors."""

OF_SOME = {"engines/openvino.py": {"openvino"}, "detection/detector.py": {"torchvision"},
           "detection/detections.py": {"torchvision"}, "cuda/kernels.py": {"cuda"}, "cuda/program.py": {"cuda"}}
"""And what an engine or a kind of model needs besides."""

IN_THE_GATEWAY = {"starlette", "uvicorn", "prometheus_client"}


def imported_modules(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[1] for name in imported_modules(file) if name.startswith("early_exit.")}
        assert ours <= MAY_IMPORT[package], f"{file.name} imports {sorted(ours - MAY_IMPORT[package])}"


def test_the_handler_needs_nothing_but_torch_and_safetensors_unless_an_engine_or_a_detector_does() -> None:
    import sys

    for file in (ROOT / "handler").rglob("*.py"):
        others = {name.split(".")[0] for name in imported_modules(file)} - set(sys.stdlib_module_names) - {"early_exit"}
        may = IN_A_WORKER | OF_SOME.get(str(file.relative_to(ROOT / "handler")), set())
        assert others <= may, f"{file.name} imports {sorted(others - may)}"


def test_the_gateway_needs_nothing_but_its_extra() -> None:
    import sys

    for file in (ROOT / "archiver" / "gateway").glob("*.py"):
        others = {name.split(".")[0] for name in imported_modules(file)} - set(sys.stdlib_module_names) - {"early_exit"}
        assert others <= IN_THE_GATEWAY, f"{file.name} imports {sorted(others - IN_THE_GATEWAY)}"


def test_the_namespace_package_has_no_init() -> None:
    """With one, an installed copy would silently win over the copy inside an archive."""
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "early_exit").exists()


def test_the_service_module_defines_one_class_and_no_handle_function() -> None:
    tree = ast.parse((ROOT / "handler" / "service.py").read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["EarlyExitService"]
    assert "handle" not in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_no_file_is_longer_than_300_lines() -> None:
    long = {str(file.relative_to(ROOT)): n_lines for package in (*MAY_IMPORT, "tests")
            for file in (ROOT / package).rglob("*.py") if (n_lines := len(file.read_text().splitlines())) > 300}
    assert not long
