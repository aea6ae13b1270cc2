"""A .pt2 file that could run code is refused, whatever way it uses; torch on its own would run that code."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.export.pt2_archive import constants

from early_exit.handler.backbone.program_file import _is_size, load_program
from early_exit.handler.errors import ArchiveError

Change = Callable[[str, bytes], bytes]


class Code:
    """An object whose unpickling runs code: it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    rows = torch.export.Dim("rows", min=1, max=64)
    torch.export.save(torch.export.export(model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: rows},)), path)
    return path


def rewritten(program: Path, target: Path, change: Change, more: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(target, "w") as sink:
        folder = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            sink.writestr(name, change(name.partition("/")[2], source.read(name)))
        for name, content in (more or {}).items():
            sink.writestr(f"{folder}/{name}", content)
    return target


def pickled_weight(trace: Path, spelling: Callable[[str], str]) -> Change:
    def change(name: str, content: bytes) -> bytes:
        if name == "data/weights/weight_0":
            torch.save(Code(trace), buffer := io.BytesIO())
            return bytes(buffer.getvalue())
        if name == "data/weights/model_weights_config.json":
            config = json.loads(content)
            next(iter(config["config"].values()))["use_pickle"] = True
            return spelling(json.dumps(config)).encode()
        return content

    return change


def opaque_constant(trace: Path) -> tuple[Change, dict[str, bytes]]:
    def change(name: str, content: bytes) -> bytes:
        if name != "data/constants/model_constants_config.json":
            return content
        return json.dumps({"config": {"constant": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True,
                                                   "tensor_meta": None}}}).encode()

    return change, {"data/constants/opaque_obj_0": pickle.dumps(Code(trace))}


def evaluated_size(trace: Path) -> Change:
    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        return content.replace(b'"expr_str": "', f'"expr_str": "__import__(\'os\').mkdir(\'{trace}\') or '.encode())

    return change


ATTACKS: dict[str, Callable[[Path], tuple[Change, dict[str, bytes]]]] = {
    "a pickled weight": lambda trace: (pickled_weight(trace, lambda text: text), {}),
    "a pickled weight, spelled without spaces": lambda trace: (
        pickled_weight(trace, lambda text: json.dumps(json.loads(text), separators=(",", ":"))), {}),
    "a pickled weight, with its key in escapes": lambda trace: (
        pickled_weight(trace, lambda text: text.replace("use_pickle", "\\u0075se_pickle")), {}),
    "an opaque constant": opaque_constant,
    "a size that is evaluated": lambda trace: (evaluated_size(trace), {}),
}


def attacking(attack: str, program: Path, folder: Path) -> tuple[Path, Path]:
    """Return a program with an attack, and the folder that its code makes when it runs."""
    folder.mkdir(exist_ok=True)
    trace = folder / "ran"
    change, more = ATTACKS[attack](trace)
    return rewritten(program, folder / "model.pt2", change, more), trace


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_that_runs_code_where_torch_reads_it_is_refused(
        attack: str, program: Path, tmp_path: Path) -> None:
    path, trace = attacking(attack, program, tmp_path)
    with pytest.raises(ArchiveError, match=r"model\.pt2 (holds|has)"):
        load_program(path)
    assert not trace.exists(), "the code ran although the file was refused"


def test_where_torch_reads_them_the_code_of_these_programs_runs(program: Path, tmp_path: Path) -> None:
    """If it did not, the refusals would prove nothing. One process reads all programs, because starting one is slow."""
    made = [attacking(attack, program, tmp_path / str(number)) for number, attack in enumerate(ATTACKS)]
    code = ("import contextlib, sys, torch\n"
            "for path in sys.argv[1:]:\n"
            "    with contextlib.suppress(Exception):\n"
            "        torch.export.load(path)\n")
    subprocess.run([sys.executable, "-c", code, *(str(path) for path, _ in made)], capture_output=True, timeout=120,
                   check=True)
    known = [attack for attack, make in ATTACKS.items()  # torch 2.9 has no opaque constants
             if make is not opaque_constant or hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX")]
    assert [attack for attack, (_, trace) in zip(ATTACKS, made) if trace.exists()] == known


def with_two_lists(shown: bytes, hidden: bytes) -> bytes:
    """Return a zip file with two lists of entries: Python reads the one at the end of the file, and torch the one that
    the end record points to. Both lists must have the same length, and `hidden` must be the longer file."""
    mark, end = b"PK\5\6", "<4s4H2LH"
    shown_end, hidden_end = (struct.unpack(end, file[file.rindex(mark):]) for file in (shown, hidden))
    assert shown_end[3:6] == hidden_end[3:6]
    start, moved = hidden.rindex(mark), shown_end[6] - hidden_end[6]
    file = bytearray(hidden[:start] + shown[:shown.rindex(mark)])
    entry = start + shown_end[6]
    for _ in range(shown_end[4]):
        [offset] = struct.unpack_from("<L", file, entry + 42)
        struct.pack_into("<L", file, entry + 42, offset - moved)  # Python adds the list's displacement to offsets
        entry += 46 + sum(struct.unpack_from("<3H", file, entry + 28))
    return bytes(file) + struct.pack(end, *hidden_end)


def test_a_program_that_shows_torch_other_entries_than_python_is_refused(program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    shown = rewritten(program, tmp_path / "shown.pt2", lambda name, content: content)
    hidden = rewritten(program, tmp_path / "hidden.pt2", pickled_weight(trace, lambda text: text))
    (path := tmp_path / "model.pt2").write_bytes(with_two_lists(shown.read_bytes(), hidden.read_bytes()))
    with pytest.raises(ArchiveError, match="two versions"):
        load_program(path)
    assert not trace.exists(), "the code ran although the file was refused"
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert trace.exists(), "torch alone does not run it, so that it is refused proves nothing"


@pytest.mark.parametrize("structure", [
    {"type": "builtins.list", "context": json.dumps({"__enum__": True, "fqn": "this:s", "name": "s"})},
    {"type": "collections.defaultdict", "context": {
        "default_factory_module": "this", "default_factory_name": "s", "dict_context": []}}])
def test_a_program_whose_inputs_make_torch_import_a_module_is_refused(
        structure: dict[str, Any], program: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        model = json.loads(content)
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["in_spec"])
        spec["children_spec"].append(structure | {"children_spec": []})
        return json.dumps(model).replace(json.dumps(signature["in_spec"]), json.dumps(json.dumps([version, spec]))
                                         ).encode()

    path = rewritten(program, tmp_path / "model.pt2", change)
    sys.modules.pop("this", None)
    with pytest.raises(ArchiveError, match="torch would import 'this"):
        load_program(path)
    assert "this" not in sys.modules
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert "this" in sys.modules, "torch alone does not import it, so that it is refused proves nothing"


@pytest.mark.parametrize("target", ["torch.serialization.os.system", "torch.ops.load_library", "os.system",
                                    "torch.ops.aten.__class__", "_operator.__class__"])
def test_a_program_that_calls_anything_but_operations_is_refused(target: str, program: Path, tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.ops.aten.conv2d.default", target.encode())

    with pytest.raises(ArchiveError, match="is no operation of torch"):
        load_program(rewritten(program, tmp_path / "model.pt2", change))


def test_a_program_that_hands_a_function_to_an_operation_is_refused(program: Path, tmp_path: Path) -> None:
    """Some operations call their arguments, and torch resolves the name of an argument like that of an operation."""
    given = [{"as_bool": False}, {"as_operator": "torch.serialization.os.system"}, {"as_string": "true"}]
    called = {"target": "torch.ops.higher_order.wrap_with_set_grad_enabled", "outputs": [{"as_none": True}],
              "inputs": [{"name": "", "arg": argument, "kind": 1} for argument in given], "metadata": {}}

    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        model = json.loads(content)
        model["graph_module"]["graph"]["nodes"].insert(0, called)
        return json.dumps(model).encode()

    path = rewritten(program, tmp_path / "model.pt2", change)
    with pytest.raises(ArchiveError, match="calls 'torch.serialization.os.system'"):
        load_program(path)
    assert os.system in [argument for node in torch.export.load(path).graph.nodes for argument in node.args]


class Copying(nn.Module):
    """A model that copies a line of text into a tensor. If the tensor is mapped to a file, this writes the line."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("line", torch.tensor([*b"a line\n"], dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(7, dtype=torch.uint8).copy_(self.line)


def test_a_program_that_writes_a_file_is_refused(tmp_path: Path) -> None:
    """A program that can write any file can run code, for example through a file that a shell reads at its start."""
    plain, written = tmp_path / "plain.pt2", tmp_path / "written"
    torch.export.save(torch.export.export(Copying(), (torch.zeros(7),)), plain)

    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        model = json.loads(content)
        [node] = [node for node in model["graph_module"]["graph"]["nodes"] if "aten.zeros" in node["target"]]
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [{"name": name, "arg": argument, "kind": 1} for name, argument in (
            ("filename", {"as_string": str(written)}), ("shared", {"as_bool": True}), ("size", {"as_int": 7}))] + [
            given for given in node["inputs"] if given["name"] == "dtype"]
        return json.dumps(model).encode()

    path = rewritten(plain, tmp_path / "model.pt2", change)
    with pytest.raises(ArchiveError, match="reads or writes files of any name"):
        load_program(path)
    torch.export.load(path).module()(torch.zeros(7))
    assert written.read_bytes() == b"a line\n", "torch alone writes nothing, so that it is refused proves nothing"


@pytest.mark.parametrize("name", ["data/constants/custom_obj_0", "models/model.pkl"])
def test_entries_that_are_no_part_of_a_program_are_refused(name: str, program: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no part of an exported program"):
        load_program(rewritten(program, tmp_path / "model.pt2", lambda name, content: content, {name: b"?"}))


def test_a_compiled_program_is_refused_as_such(program: Path, tmp_path: Path) -> None:
    more = {"data/aotinductor/model/model.so": b"?"}
    with pytest.raises(ArchiveError, match="AOT library.*torch.export.save"):
        load_program(rewritten(program, tmp_path / "model.pt2", lambda name, content: content, more))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice_is_refused(program: Path, tmp_path: Path) -> None:
    more = {"data/weights/model_weights_config.json": b'{"config": {}}'}
    with pytest.raises(ArchiveError, match="twice"):
        load_program(rewritten(program, tmp_path / "model.pt2", lambda name, content: content, more))


def test_a_program_that_would_fill_the_memory_is_refused_before_it_is_read(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(program.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/extra/zeros", bytes(1_000_000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ArchiveError, match="is compressed"):
        load_program(path)


def test_a_program_of_torch_is_read(program: Path) -> None:
    assert load_program(program).module()(torch.zeros(5, 3, 8, 8)).shape == (5, 2)


@given(st.text(alphabet="abcs019_().,+-*/ '\"[]{}:;=<>\\@", max_size=30))
def test_what_passes_for_a_size_reaches_no_attribute_and_no_item(expression: str) -> None:
    if _is_size(expression):
        kinds = {type(node) for node in ast.walk(ast.parse(expression, mode="eval"))}
        assert not kinds & {ast.Attribute, ast.Subscript, ast.Lambda, ast.JoinedStr, ast.NamedExpr, ast.ListComp}


def test_sizes_of_torch_pass_and_others_do_not() -> None:
    for expression in ("s0", "2*s77 + 1", "Max(1, s0)", "FloorDiv(s27, 2)", "(s0 - 1)//2", "u0", "int_oo",
                       "Symbol('s31', positive=True, integer=True)", "Mul(Integer(4), Symbol('s0'))"):
        assert _is_size(expression), expression
    for expression in ("__import__('os')", "s0.__class__", "open", "exec(s0)", "lambda: s0", "s0[0]", "Symbol('a.b')",
                       "sympify('s0')", "preview(s0)", "[s0 for s1 in s2]", "(s0 := s1)", "f'{s0}'"):
        assert not _is_size(expression), expression
