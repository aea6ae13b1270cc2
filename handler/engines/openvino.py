"""Stages executed by OpenVINO, in float32 or with the 8-bit integers that `archiver/packaging/quantize.py` made.

The backbone is quantized in pieces, cut at all its candidate layers, so that the same integers serve any plan. The
pieces of a stage are joined to one model, as if the backbone had never been cut there. If the next stage begins by
quantizing an activation, the activation passes between the stages as integers. The cut then costs no computation, and
only a quarter of the bytes is copied.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import LOOKUPS, inputs_of, split
from early_exit.handler.backbone.signature import HALF_PRECISION
from early_exit.handler.engines.compiled_stage import CompiledStage, Read
from early_exit.handler.errors import ArchiveError, ConfigError

PIECES = "int8"
"""Folder of the quantized pieces, beside the backbone."""
_STEPS = 255
_SAME_NUMBERS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default, torch.ops.aten.view.default,
                 torch.ops.aten.reshape.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim,
                 torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.contiguous.default)
"""Operations that return all the numbers that they get, if they return integers of `_INTEGERS`."""
_INTEGERS = (torch.int32, torch.int64)
Model = Any
"""An `openvino.Model`; the package is optional and has no complete types."""


def import_openvino() -> Any:
    """Import the package without its telemetry, so that nothing leaves the machine.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise ConfigError("the engines openvino and openvino-int8 need the module openvino, which is missing here: "
                          "install the package openvino, or the project with its extra 'openvino', as in "
                          "pip install '.[openvino]' in its folder") from error
    return openvino


def convert(stage: fx.GraphModule) -> Model:
    """Return a stage as a float32 model that takes any number of rows.

    The nodes of its inputs are named in0, in1, ..., and those of its outputs out0, out1, ...
    """
    openvino = import_openvino()
    values = [node.meta["val"] for node in inputs_of(stage.graph)]
    example = tuple(in_float32(torch.zeros(2, *map(int, value.shape[1:]), dtype=value.dtype)) for value in values)
    rows = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(_InFloat32(stage, [value.dtype for value in values]), example,
                                      dynamic_shapes=(tuple({0: rows} for _ in example),))
    if hasattr(program, "_guards_code"):
        program._guards_code = []  # torch 2.9 cannot run the guards of several inputs that are given as *live
    model = openvino.convert_model(program)
    model.reshape({number: [-1, *tensor.shape[1:]] for number, tensor in enumerate(example)})
    # The nodes get the names, not the tensors: a tensor that passes through, such as a mask, is both input and output.
    for ends, name in ((model.inputs, "in"), (model.outputs, "out")):
        for number, end in enumerate(ends):
            end.get_node().set_friendly_name(f"{name}{number}")
    return model


def in_float32(x: Tensor) -> Tensor:
    """Convert a tensor of half precision to float32: OpenVINO takes tensors from NumPy, which has no bfloat16."""
    return x.float() if x.dtype in HALF_PRECISION else x


class _InFloat32(nn.Module):
    """A stage that takes and returns float32 instead of half precision, with the same values."""

    def __init__(self, stage: nn.Module, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        self.stage, self._dtypes = stage, dtypes

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(in_float32, self.stage(*(x.to(dtype) for x, dtype in zip(live, self._dtypes)))))


def _end(ends: Sequence[Any], name: str) -> Any:
    """Return the input or output with a name that `convert` gave.

    Raises:
        ArchiveError: there is none. Pieces that were quantized before nodes had these names are an example.
    """
    for end in ends:
        if end.get_node().get_friendly_name() == name:
            return end
    raise ArchiveError(f"a part of the quantized model has no {name}: quantize it again with ee-archive --engine "
                       "openvino-int8 --calibrate RECORDS")


def compile_float(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    """Return the stages of a backbone in float32."""
    stages = split(backbone.graph, boundaries)
    return [CompiledStage(_Compiled(convert(stage), _table_sizes(stage))) for stage in stages]


def compile_int8(backbone: Backbone, boundaries: Sequence[str]) -> list[CompiledStage]:
    """Return the stages of a backbone from its quantized pieces.

    Raises:
        ArchiveError: pieces are missing.
    """
    openvino = import_openvino()
    files = sorted((backbone.folder / PIECES).glob("*.xml")) if backbone.folder else []
    nodes = [layer.node for layer in backbone.description.candidates]
    if len(files) != len(nodes) + 1:
        raise ArchiveError(f"the engine openvino-int8 needs {len(nodes) + 1} quantized pieces, found {len(files)}: "
                           "make them with ee-archive --engine openvino-int8 --calibrate RECORDS")
    core = openvino.Core()
    ends = [0, *(nodes.index(node) + 1 for node in boundaries), len(files)]
    stages = [_joined([core.read_model(file) for file in files[start:end]]) for start, end in pairwise(ends)]
    reads = [_travel_as_integers(stage, following) for stage, following in pairwise(stages)]
    tables = map(_table_sizes, split(backbone.graph, boundaries))
    return [CompiledStage(_Compiled(stage, sizes), read)
            for stage, sizes, read in zip(stages, tables, [*reads, Tensor.float])]


def int8_digest(folder: Path) -> str:
    """Return a hash that identifies the quantized pieces in an archive's folder."""
    digest = hashlib.sha256()
    for file in sorted((folder / PIECES).glob("*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _joined(pieces: Sequence[Model]) -> Model:
    """Return one model that runs the pieces one after the other."""
    for before, after in pairwise(pieces):
        for number in range(len(after.inputs)):
            _replace(_end(after.inputs, f"in{number}"), _source(before, number))
    results = [_end(pieces[-1].outputs, f"out{number}").get_node() for number in range(len(pieces[-1].outputs))]
    parameters = [_end(pieces[0].inputs, f"in{number}").get_node() for number in range(len(pieces[0].inputs))]
    return import_openvino().Model(results, parameters)


def _source(model: Model, number: int) -> Any:
    """Return the computed value that becomes an output."""
    return _end(model.outputs, f"out{number}").get_node().input_value(0)


def _replace(old: Any, new: Any) -> None:
    """Let all readers of one value read another value instead."""
    for reader in list(old.get_target_inputs()):
        reader.replace_source_output(new)


def _travel_as_integers(stage: Model, following: Model) -> Read:
    """Move the quantization of the first tensor from after a cut to before it, if all readers quantize it alike.

    Returns:
        The conversion of the tensor to the float32 activation.
    """
    openvino = import_openvino()
    ops = openvino.opset13
    parameter = _end(following.inputs, "in0")
    readers = [reader.get_node() for reader in parameter.get_target_inputs()]
    ranges = [_range(reader) for reader in readers]
    if not ranges or ranges[0] is None or any(limits != ranges[0] for limits in ranges):
        return Tensor.float
    low, high = ranges[0]
    scale = (high - low) / _STEPS
    result = _end(stage.outputs, "out0").get_node()
    low_to_high, no_to_all_steps = ([ops.constant(limit, openvino.Type.f32) for limit in limits]
                                    for limits in ((low, high), (0, _STEPS)))
    steps = ops.fake_quantize(result.input_value(0), *low_to_high, *no_to_all_steps, _STEPS + 1)
    result.input(0).replace_source_output(ops.convert(steps, "u8").output(0))
    stage.validate_nodes_and_infer_types()
    parameter.get_node().set_element_type(openvino.Type.u8)
    parameter.get_node().validate_and_infer_types()
    centred = ops.subtract(ops.convert(parameter, "f32"), ops.constant(-low / scale, openvino.Type.f32))
    floats = ops.multiply(centred, ops.constant(scale, openvino.Type.f32)).output(0)
    for reader in readers:
        _replace(reader.output(0), floats)
    following.validate_nodes_and_infer_types()
    return partial(_read_integers, scale=scale, low=low)


def _range(node: Any) -> tuple[float, float] | None:
    """Return the range of a quantization of a whole tensor to 8 bits, or None for any other operation."""
    if node.get_type_name() != "FakeQuantize" or node.get_levels() != _STEPS + 1:
        return None
    limits = [node.input_value(number).get_node() for number in range(1, 5)]
    values = [limit.get_vector().tolist() for limit in limits if limit.get_type_name() == "Constant"]
    if len(values) < 4 or any(len(value) != 1 for value in values) or values[:2] != values[2:]:
        return None
    return values[0][0], values[1][0]


def _read_integers(x: Tensor, *, scale: float, low: float) -> Tensor:
    return x.float().mul_(scale).add_(low) if low else x.float().mul_(scale)


class _Compiled(nn.Module):
    """An OpenVINO model as a module, which returns new tensors, or an input that it does not change."""

    def __init__(self, model: Model, table_sizes: Mapping[int, int]) -> None:
        super().__init__()
        openvino = import_openvino()
        self._table_sizes = table_sizes
        self._tensor = openvino.Tensor
        # OpenVINO would choose bfloat16 on some processors, but the engine must compute in float32 on all of them.
        compiled = openvino.compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads()})
        self._inputs = [_end(compiled.inputs, f"in{number}") for number in range(len(compiled.inputs))]
        self._outputs = [_end(compiled.outputs, f"out{number}") for number in range(len(compiled.outputs))]
        self._passed = _passed(model)
        """The number of the input that an output is, for each output that is one."""
        self._made = [([size.get_length() for size in list(end.partial_shape)[1:]],
                       getattr(torch, str(end.element_type.to_dtype()))) for end in self._outputs]
        """The shape of a row and the dtype of each output."""
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        for number, n_rows in self._table_sizes.items() if len(live[0]) else ():
            low, high = live[number].aminmax()
            if low < 0 or high >= n_rows:  # OpenVINO reads other rows, or other memory
                raise IndexError(f"index out of range: expected row numbers from 0 to {n_rows - 1} of a table, found "
                                 f"{int(low)} to {int(high)}")
        given = [x.detach().contiguous() for x in live]  # held until the run has ended: the request only borrows memory
        # The outputs need memory of their own: the next run overwrites memory that the request allocated itself. An
        # input that is passed on gets none: OpenVINO would not copy it, and would write into the input instead.
        made = tuple(given[self._passed[number]] if number in self._passed else
                     torch.empty((len(live[0]), *row), dtype=dtype) for number, (row, dtype) in enumerate(self._made))
        if len(live[0]):
            with self._lock:
                for port, x in zip(self._inputs, given):
                    self._request.set_tensor(port, self._tensor(x.numpy(), shared_memory=True))
                for number, (port, x) in enumerate(zip(self._outputs, made)):
                    if number not in self._passed:
                        self._request.set_tensor(port, self._tensor(x.numpy(), shared_memory=True))
                self._request.infer()
        return made


def _table_sizes(stage: fx.GraphModule) -> dict[int, int]:
    """Return the number of rows of the smallest table in which an input of a stage looks up rows, by the number of the
    input.

    An input from which the row numbers are computed first is left out.
    """
    inputs, sizes = [*inputs_of(stage.graph)], dict[int, int]()
    for node in stage.graph.nodes:
        if node.target in LOOKUPS:
            table, rows = node.all_input_nodes[:2]
            while rows.target in _SAME_NUMBERS and rows.meta["val"].dtype in _INTEGERS:
                rows = rows.all_input_nodes[0]
            if rows in inputs and rows.meta["val"].dtype in _INTEGERS:
                number, n_rows = inputs.index(rows), int(table.meta["val"].shape[0])
                sizes[number] = min(n_rows, sizes.get(number, n_rows))
    return sizes


def _passed(model: Model) -> dict[int, int]:
    """Return the number of the input by the number of the output, for each output that is an input as it is."""
    sources = {int(end.get_node().get_friendly_name().removeprefix("out")): end.get_node().input_value(0).get_node()
               for end in model.outputs}
    return {number: int(source.get_friendly_name().removeprefix("in")) for number, source in sources.items()
            if source.get_type_name() == "Parameter"}
