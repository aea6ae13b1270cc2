"""Reads the `.pt2` file of an exported program, if it holds nothing but tensors and a graph of torch's operations.

`torch.export.load` trusts its file: it unpickles entries that the file names, loads compiled libraries, evaluates sizes
as Python, imports modules for the structure of inputs, and resolves an operation by any dotted name below `torch`. A
file is therefore examined first. The examination parses the contents; it does not rely on their spelling.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from early_exit.handler.errors import ArchiveError, Unsupported

_PLAIN = re.compile(r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|"
                    r"data/weights/weight_\d+|data/constants/tensor_\d+|extra/[\w.-]+")
"""Entries that torch reads as bytes: markers, raw tensors, and files of the user that it returns without parsing."""
_TENSOR_CONFIG = re.compile(r"data/(weights|constants)/\w+_(weights|constants)_config\.json")
_PICKLED_TENSORS = re.compile(r"data/(weights|constants|sample_inputs)/\w+\.pt")
_GRAPH = re.compile(r"models/\w+\.json")
_OPERATION = re.compile(
    r"torch\.ops\.[a-z]\w*\.((?!__)\w+|__i?(and|or|xor|lshift|rshift)__)(\.(?!__)\w+)?"
    r"|_operator\.(?!__)\w+|math\.(?!__)\w+|torch\.sym_\w+")
"""Names of operations. torch would also resolve other names, such as `torch.serialization.os.system`."""
_OF_FILES = re.compile(r"torch\.ops\.\w+\.(\w+_)?(file|load|save)(_\w+)?(\.\w+)?")
"""Names of operations that read or write a file at any path, such as `torch.ops.aten.from_file`."""
_SYMBOL = re.compile(r"[a-z]{1,4}\d+")
_FUNCTIONS = frozenset({
    "Symbol", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv",
    "FloatTrueDiv", "Abs", "floor", "ceiling", "ModularIndexing", "PowByNatural", "FloatPow", "ToFloat", "TruncToInt",
    "FloorToInt", "CeilToInt", "RoundToInt", "Identity", "Integer", "Rational", "Float", "Eq", "Ne", "Lt", "Le", "Gt",
    "Ge", "And", "Or", "Not", "Piecewise", "Where", "true", "false", "oo", "int_oo"})
"""Names in sizes that torch.export writes, such as "Mul(Integer(2), Symbol('s31', positive=True))"."""
_ARITHMETIC = (ast.Expression, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop, ast.BoolOp, ast.boolop, ast.Compare,
               ast.cmpop, ast.Call, ast.keyword, ast.Load)


def load_program(path: Path) -> ExportedProgram:
    """Read a .pt2 file.

    Raises:
        ArchiveError: the file is not an exported program that this torch can read, or reading it could run code.
    """
    _examine(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a damaged or newer file
        raise ArchiveError(f"{path.name} cannot be read as an exported program by torch {torch.__version__}: "
                           f"{type(error).__name__}: {error}") from error


def _examine(path: Path) -> None:
    # This import takes as long as that of torch, and most commands load no program.
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # If two entries have the same name, some readers take the first and others the last.
            if twice := [name for name, count in Counter(name.lower() for name in names).items() if count > 1]:
                raise ArchiveError(f"{path.name} holds {twice[0]} twice: export the program again")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ArchiveError(f"{path.name} is compressed, which programs of torch never are, and may unpack to "
                                   "any size: export the program again")
            if len({name.partition("/")[0] for name in names}) != 1:
                raise ArchiveError(f"{path.name} is not an exported program: expected one folder in it")
            with PT2ArchiveReader(str(path)) as torchs:
                for name in names:
                    inner, content = name.partition("/")[2], archive.read(name)
                    # The readers of torch and Python find the list of entries in different ways, so in a forged file
                    # they may see different entries.
                    if torchs.read_bytes(inner) != content:
                        raise ArchiveError(f"{path.name} holds two versions of {name}: export the program again")
                    _examine_entry(path, inner, content)
                if len(torchs.get_file_names()) != len(names):
                    raise ArchiveError(f"{path.name} holds entries that are not in its list: export the program again")
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # torch's reader raises a RuntimeError
        raise ArchiveError(f"cannot read {path} as an exported program: {error}") from error


def _examine_entry(path: Path, name: str, content: bytes) -> None:
    if _PICKLED_TENSORS.fullmatch(name):
        try:
            if content:
                torch.load(io.BytesIO(content), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise ArchiveError(f"{path.name} holds more than tensors in {name}, and unpickling that could run any "
                               "code: export it with tensors as example inputs") from error
    elif _TENSOR_CONFIG.fullmatch(name):
        for payload in _dicts(_parsed(path, name, content)):
            if "path_name" in payload and (payload.get("use_pickle") is not False or not re.fullmatch(
                    r"(weight|tensor)_\d+", str(payload["path_name"]))):
                raise ArchiveError(f"{path.name} holds the pickled entry {payload['path_name']!r}: save it with plain "
                                   "tensors")
    elif _GRAPH.fullmatch(name):
        _examine_graph(path, _parsed(path, name, content))
    elif name.startswith("data/aotinductor/"):
        raise ArchiveError(f"{path.name} is an AOT library: AOTInductor has compiled the operations, so there is no "
                           "graph to cut. Save the program before it is compiled, with torch.export.save",
                           Unsupported.AOT_LIBRARY)
    elif not _PLAIN.fullmatch(name):
        raise ArchiveError(f"{path.name} holds {name!r}, which is no part of an exported program that may be read: "
                           "compiled libraries and custom objects are refused; use torch.export.save")


def _examine_graph(path: Path, graph: object) -> None:
    for part in _dicts(graph):
        expression = part.get("expr_str")
        for target in _called(part):
            if not _OPERATION.fullmatch(target):
                raise ArchiveError(f"{path.name} calls {target!r}, which is no operation of torch: refused")
            if _OF_FILES.fullmatch(target):
                raise ArchiveError(f"{path.name} calls {target!r}, which reads or writes files of any name: refused")
        if expression is not None and not _is_size(str(expression)):
            raise ArchiveError(f"{path.name} has the size {expression!r:.80}, which is no arithmetic expression: "
                               "refused")
        for spec in (part.get("in_spec"), part.get("out_spec")):
            if spec is not None and (module := _imported(spec)) is not None:
                raise ArchiveError(f"{path.name} has inputs or outputs in a structure for which torch would import "
                                   f"{module!r:.80}: refused; export the program with lists, tuples and dicts")


def _called(part: dict[str, Any]) -> list[str]:
    """Return the names of the functions that a part of a graph calls, or passes to an operation that calls them."""
    is_node = "inputs" in part and "outputs" in part
    named = (part.get("target") if is_node else None, part.get("as_operator"))
    return [str(target) for target in named if target is not None]


def _imported(structure: object) -> str | None:
    """Return the name that torch would import for the structure of a program's inputs or outputs, or None.

    The structure is JSON, in which strings may be JSON again.
    """
    waiting = [structure]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            with contextlib.suppress(ValueError):  # most strings are names, not JSON
                waiting.append(json.loads(part))
        elif isinstance(part, dict):
            if "__enum__" in part:
                return str(part.get("fqn"))
            if part.get("default_factory_module", "builtins") != "builtins":
                return str(part["default_factory_module"])
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return None


def _is_size(expression: str) -> bool:
    """Tell whether an expression, which torch evaluates as Python, is arithmetic and nothing else."""
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in nodes:
        if isinstance(node, ast.Name):
            is_known = node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
        elif isinstance(node, ast.Constant):
            is_known = isinstance(node.value, (int, float)) or (
                isinstance(node.value, str) and _SYMBOL.fullmatch(node.value) is not None)
        else:
            is_known = isinstance(node, _ARITHMETIC)
        if not is_known:
            return False
    return True


def _parsed(path: Path, name: str, content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ArchiveError(f"{name} in {path.name} is not JSON, so the file is damaged: {error}") from error


def _dicts(value: object) -> Iterator[dict[str, Any]]:
    """Yield every dict in parsed JSON."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
