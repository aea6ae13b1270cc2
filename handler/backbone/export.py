"""Exports an eager classifier to a graph of ATen operations, or says why that is not possible."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import Argument
from torch.overrides import TorchFunctionMode

from early_exit.handler.backbone.detector_tails import keep_beside
from early_exit.handler.backbone.graph import (
    Memory,
    batch_size,
    inputs_of,
    is_batch_first,
    reads_inputs,
    tensor_of,
)
from early_exit.handler.backbone.regions import inline_regions
from early_exit.handler.backbone.signature import HALF_PRECISION, InputSpec, OutputSpec, Parameters
from early_exit.handler.errors import GraphError, Unsupported

_BY_NUMBER = "use_mm_for_euclid_dist_if_necessary"
"""The default mode of `torch.cdist`: for more than `_MANY_POINTS` points it uses a matrix product."""
_MANY_POINTS = 25
_TRAINING_FLAG = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "batch_norm": 5}
"""The operations that can draw at random or use the statistics of the batch, with the index of the argument that makes
them do so."""
_SQUEEZE = {torch.ops.aten.squeeze.default: torch.ops.aten.squeeze.dims,
            torch.ops.aten.squeeze_.default: torch.ops.aten.squeeze_.dims}
"""The operations that drop every dimension of size 1, including the batch dimension of a batch of one. Each is mapped
to the operation that drops chosen dimensions only."""

_SORTING = (torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without wrappers that compile it or spread it over devices."""
    while inner := getattr(model, "_orig_mod", None) or (isinstance(model, nn.DataParallel) and model.module):
        model = inner
    return model


class ScoresOnly(nn.Module):
    """Wraps a classifier: it takes the inputs in order, and returns only the scores of the classifier's output."""

    def __init__(self, model: nn.Module, names: Sequence[str], constants: Mapping[str, Any], output: str | None,
                 note: Callable[[OutputSpec], object]) -> None:
        super().__init__()
        self.model = model
        self._names, self._constants, self._output, self._note = names, constants, output, note
        # Arguments that only a position names cannot be passed by name, and a name that the model lacks names none.
        first, known = Parameters.of(model.forward).name(0), inspect.signature(model.forward).parameters.values()
        self._by_position = len(names) == 1 and not constants and first is not None and (names[0] == first or not any(
            one.name == names[0] or one.kind is inspect.Parameter.VAR_KEYWORD for one in known))

    def forward(self, *inputs: Tensor) -> Tensor:
        with _ForAnyBatch():
            output = self.model(*inputs) if self._by_position else self.model(**dict(zip(self._names, inputs)),
                                                                              **self._constants)
        spec = OutputSpec.of(output, self._output)
        self._note(spec)  # torch.export undoes what is assigned to the module
        return spec.scores(output)


class _ForAnyBatch(TorchFunctionMode):
    """Makes the choices that torch bases on the number of rows, because they would fix that number in the export."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cdist and kwargs.get("compute_mode", _BY_NUMBER) == _BY_NUMBER:
            # The rule is that of torch, applied to the fixed size alone.
            by_products = any(isinstance(x.shape[-2], int) and x.shape[-2] > _MANY_POINTS for x in args[:2])
            kwargs = {**kwargs, "compute_mode": f"{'' if by_products else 'donot_'}use_mm_for_euclid_dist"}
        return func(*args, **kwargs)


def export_backbone(model: nn.Module, inputs: Sequence[InputSpec],
                    constants: Mapping[str, Any] = MappingProxyType({}), output: str | None = None
                    ) -> tuple[ExportedProgram, OutputSpec]:
    """Export a classifier's inference pass with a dynamic batch dimension.

    Args:
        model: the classifier.
        inputs: the tensors that it takes.
        constants: constant values that it takes besides the tensors, by name.
        output: the name or index of the output with the scores; needed only if several outputs could be scores.

    Returns:
        The program, which maps the inputs in order to (B, K) scores, and the place of the scores in the model's output.

    Raises:
        GraphError: the model cannot be exported; the message names the operation and the line that prevent it.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("multi_label_classification", "regression"):
        raise GraphError(f"the model's config says problem_type {problem!r}: an exit answers "
                         "with one of several classes, which requires a single-label classifier")
    model.eval()
    outputs: list[OutputSpec] = []
    wrapped = ScoresOnly(model, [spec.name for spec in inputs], constants, output, outputs.append)
    # Two rows, because torch.export takes a size of 0 or 1 for a constant.
    example = tuple(spec.zeros(2) for spec in inputs)
    batch = Dim("batch", min=1)
    try:
        with torch.no_grad():
            program = torch.export.export(wrapped, example, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
    except GraphError:
        raise
    except Exception as error:  # torch.export raises many kinds, and each is about the user's model
        # This import takes a while, and most commands export nothing.
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        sizes = "; ".join(f"{spec.name}: (batch, {', '.join(map(str, spec.shape))})" for spec in inputs)
        branches = isinstance(error, GuardOnDataDependentSymNode)
        raise GraphError(f"{type(model).__name__} cannot be exported for input {sizes}: {_line_of(error)}"
                         f"{type(error).__name__}: {error}",
                         Unsupported.CONTROL_FLOW if branches else None) from error
    return program, outputs[-1]


def _line_of(error: BaseException) -> str:
    """Describe the last line of the model's own code that an error passed through."""
    torch_folder = str(Path(torch.__file__).parent)
    if "specialized it to be a constant" in str(error):  # found only at the end of the export
        return "its code fixes the number of rows, as len(x) does: write x.shape[0] instead of len(x). "
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((torch_folder, __file__, "<"))]
    if not own:
        return ""
    return f"it stops in {own[-1].name} ({Path(own[-1].filename).name}:{own[-1].lineno}) at '{own[-1].line}' with "


def prepare_program(program: ExportedProgram) -> None:
    """Bring a program into the form that can be cut: a single graph, whose values have the same rank for every batch.

    Raises:
        GraphError: the program has a subgraph that cannot be inlined.
    """
    inline_regions(program)
    for node in program.graph.nodes:
        if node.target in _SQUEEZE:
            shape = node.args[0].meta["val"].shape
            node.target = _SQUEEZE[node.target]
            ones = [place for place, size in enumerate(shape) if isinstance(size, int) and size == 1]
            node.args = (node.args[0], ones)
    program.graph_module.recompile()


def backbone_graph(program: ExportedProgram) -> fx.GraphModule:
    """Return the forward pass of an exported backbone as a graph with its parameters attached.

    The inputs of the graph are (B, ...) tensors in the order of the program, and its output is the (B, K) scores. The
    graph writes into none of its inputs.

    Raises:
        GraphError: the program does not map (B, ...) tensors to one (B, K) tensor.
    """
    module = program.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise GraphError(f"expected a graph from torch.export, found {type(module).__name__}")
    inputs = inputs_of(module.graph)
    if not inputs or any(tensor_of(node) is None for node in inputs):
        raise GraphError(f"expected a backbone whose inputs are tensors, found {inputs}")
    batch = batch_size(module.graph)
    if not isinstance(batch, torch.SymInt):
        raise GraphError(f"the program was exported for batches of exactly {batch}: export it with "
                         "dynamic_shapes=({0: torch.export.Dim('batch', min=1)},)")
    if not all(is_batch_first(node, batch) for node in inputs):
        raise GraphError("expected inputs with one row per item, found "
                         + ", ".join(f"{node.name} of shape {tuple(node.meta['val'].shape)}" for node in inputs))
    data = reads_inputs(module)
    training = [node.name for node in module.graph.nodes if _is_training(node, data)]
    if training:
        raise GraphError(f"{', '.join(training[:3])} would behave as in training, at random or by the statistics of "
                         "the batch: call model.eval() before exporting, and call functions such as F.dropout and "
                         "F.batch_norm with training=self.training")
    scores = [_in_float32(node) for node in _outputs(module.graph)]
    if len(scores) != 1 or tensor_of(scores[0]) is None:
        raise GraphError(f"expected a backbone that returns one tensor of scores, found {len(scores)} outputs")
    shape = tuple(scores[0].meta["val"].shape)
    if len(shape) != 2 or not is_batch_first(scores[0], batch):
        raise GraphError(f"expected scores of shape (batch, classes), found {shape}: is this a classifier?")
    if _before_casts(scores[0]).target is torch.ops.aten.sigmoid.default:
        raise GraphError(f"the backbone ends in a sigmoid over {shape[1]} scores: a multi-label model has no single "
                         "class for an exit to answer with, and a binary classifier must return two scores, such as "
                         "torch.cat([-z, z], dim=1) / 2 of its logit z")
    if sorting := _sorting(scores[0]):
        raise GraphError(f"the backbone returns its scores in the order of their size ({sorting.name}), so their "
                         "positions do not stand for classes, but an exit head learns a score for each class: let the "
                         "model return all scores, and let the handler select the top ones",
                         Unsupported.SEVERAL_SCORES)
    # The graph takes tensors and returns one tensor, whatever structures the program was exported with.
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.output_node().args = (scores[0],)
    for node in reversed(module.graph.nodes):  # such as the last states of an LSTM of which only the outputs are read
        if node.target is operator.getitem and not node.users:
            module.graph.erase_node(node)
    keep_beside(scores[0])
    _keep_inputs(module.graph)
    # A plain module, because the module that torch.export returns forbids eval(), which every handler calls.
    return fx.GraphModule(module, module.graph)


def _keep_inputs(graph: fx.Graph) -> None:
    """Let operations that write into an input write into a copy of it.

    Inputs are read more than once: by later stages, which compute a mask again from them, for example, and for the
    reference of an engine that is not exact.
    """
    inputs, writes = inputs_of(graph), Memory(graph).writes
    for node in inputs:
        if node in writes:
            with graph.inserting_after(inputs[-1]):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)  # type: ignore[misc]


def scores_dtype(program: ExportedProgram) -> str:
    """Return the name of the dtype in which an exported backbone returns its scores."""
    value = tensor_of(_outputs(program.graph)[0])
    return "float32" if value is None else str(value.dtype).removeprefix("torch.")


def computed_in(graph: fx.Graph) -> torch.dtype:
    """Return the dtype in which the scores of a backbone's graph are computed, before they are cast."""
    scores = graph.output_node().args[0]
    value = tensor_of(_before_casts(scores)) if isinstance(scores, fx.Node) else None
    return torch.float32 if value is None or not value.is_floating_point() else value.dtype


def _before_casts(node: fx.Node) -> fx.Node:
    while node.target in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
        node = node.all_input_nodes[0]
    return node


def _sorting(scores: fx.Node) -> fx.Node | None:
    """Return the operation that sorts a backbone's scores by size, if there is one."""
    node = scores
    while node.target not in _SORTING:
        if len(node.all_input_nodes) != 1:
            return None
        [node] = node.all_input_nodes
    return node


def _in_float32(scores: fx.Node) -> fx.Node:
    """Cast scores to float32, in which exits compute, if they have half precision, for example after autocast."""
    value = tensor_of(scores)
    if value is None or value.dtype not in HALF_PRECISION:
        return scores
    with scores.graph.inserting_after(scores):
        cast = scores.graph.call_function(torch.ops.aten.to.dtype, (scores, torch.float32))
    cast.meta = {**scores.meta, "val": value.float()}
    return cast


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    nodes: list[fx.Node] = []

    def collect(argument: Argument) -> Argument:
        if isinstance(argument, fx.Node):
            nodes.append(argument)
        return argument

    fx.node.map_aggregate(graph.output_node().args, collect)
    return nodes


def _is_training(node: fx.Node, data: Container[fx.Node]) -> bool:
    """Tell whether an operation draws at random or uses the statistics of the batch."""
    name = getattr(node.target, "__name__", "").split(".")[0].rstrip("_")
    flag = _TRAINING_FLAG.get(name)
    if flag is None or len(node.args) <= flag or node.args[flag] is not True:
        return False
    # A batch norm may also standardise weights, which are not a batch; it then has no running statistics.
    return name != "batch_norm" or node.args[0] in data or node.args[3] is not None
