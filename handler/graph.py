"""The backbone as a graph of ATen operations: export it, find its cuts, split it into stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import Argument

from early_exit.handler.errors import GraphError

SYM_SIZE = torch.ops.aten.sym_size.int


def export_backbone(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype) -> ExportedProgram:
    """Export a classifier's inference pass with a dynamic batch dimension.

    Args:
        model: maps one (B, *input_shape) tensor to (B, K) scores.
        input_shape: the shape of one item.
        dtype: of the input.

    Raises:
        GraphError: the model cannot be exported; the message names the operation that stands in the way.
    """
    model.eval()
    # Two rows: a batch of 0 or 1 would be taken for a constant.
    example = torch.zeros((2, *input_shape), dtype=dtype)
    try:
        with torch.no_grad():
            return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
    except Exception as error:  # torch.export raises many kinds, and each is about the user's model
        raise GraphError(
            f"{type(model).__name__} cannot be exported for input (batch, {', '.join(map(str, input_shape))}): "
            f"{type(error).__name__}: {error}"
        ) from error


def backbone_graph(program: ExportedProgram) -> fx.GraphModule:
    """Return the forward pass of an exported backbone as a graph with its parameters attached.

    Raises:
        GraphError: it does not map one (B, ...) tensor to one (B, K) tensor.
    """
    module = program.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise GraphError(f"expected a graph from torch.export, found {type(module).__name__}")
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise GraphError(f"expected a backbone with one input tensor, found {len(inputs)}: {inputs}")
    batch = inputs[0].meta["val"].shape[0]
    if not isinstance(batch, torch.SymInt):
        raise GraphError(f"the program was exported for batches of exactly {batch}: export it with "
                         "dynamic_shapes=({0: torch.export.Dim('batch', min=1)},)")
    training = [node.name for node in module.graph.nodes if _is_training(node)]
    if training:
        raise GraphError(f"{', '.join(training[:3])} would behave as in training: call model.eval() before exporting")
    scores = _outputs(module.graph)
    if len(scores) != 1 or _tensor(scores[0]) is None:
        raise GraphError(f"expected a backbone that returns one tensor of scores, found {len(scores)} outputs")
    if not _is_batch_first(scores[0], inputs[0]) or len(scores[0].meta["val"].shape) != 2:
        shape = tuple(scores[0].meta["val"].shape)
        raise GraphError(f"expected scores of shape (batch, classes), found {shape}: is this a classifier?")
    # A plain module: the one that torch.export returns forbids eval(), which every handler calls.
    return fx.GraphModule(module, module.graph)


def find_cuts(graph: fx.Graph) -> list[fx.Node]:
    """Return the values on which alone the rest of the backbone depends, in order of computation.

    A value is a cut when it is the only tensor still alive right after it was computed, so that the
    output is a function of it (the paper's criterion, section 3.1). Parameters, and what follows from
    parameters and shapes alone, do not count: any stage can compute them again. A cut has one row per
    item of the batch.
    """
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    data = _data_nodes(nodes)
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in data}
    source = next(node for node in nodes if node.op == "placeholder")
    cuts: list[fx.Node] = []
    alive: set[fx.Node] = set()
    for index, node in enumerate(nodes):
        if node.op == "output":
            break
        if node in data:
            alive.add(node)
        alive = {value for value in alive if last_use[value] > index}
        is_new = node in data and node is not source
        if is_new and alive == {node} and _tensor(node) is not None and _is_batch_first(node, source):
            cuts.append(node)
    return cuts


def split(module: fx.GraphModule, boundaries: Sequence[str]) -> list[fx.GraphModule]:
    """Split a backbone at cuts into stages that map one tensor to one tensor.

    Args:
        module: what `backbone_graph` returned.
        boundaries: names of cuts, in order of computation.

    Returns:
        len(boundaries) + 1 graph modules; chained they compute exactly what `module` computes, for any
        number of rows, and the rows may become fewer between two stages.

    Raises:
        GraphError: a boundary is not a cut of this graph.
    """
    by_name = {node.name: node for node in module.graph.nodes}
    cuts = {node.name for node in find_cuts(module.graph)}
    unknown = [name for name in boundaries if name not in cuts]
    if unknown:
        raise GraphError(f"not cuts of this backbone: {', '.join(unknown)}")
    source = next(node for node in module.graph.nodes if node.op == "placeholder")
    starts = [source, *(by_name[name] for name in boundaries)]
    ends = [*starts[1:], _outputs(module.graph)[0]]
    data = _data_nodes(list(module.graph.nodes))
    return [_stage(module, start, end, data) for start, end in zip(starts, ends)]


def _stage(module: fx.GraphModule, start: fx.Node, end: fx.Node, data: set[fx.Node]) -> fx.GraphModule:
    """Return the part of a graph that computes `end` from `start`."""
    graph = fx.Graph()
    placeholder = graph.placeholder("x")
    placeholder.meta = dict(start.meta)
    copies: dict[fx.Node, fx.Node] = {start: placeholder}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.target is SYM_SIZE:
                # The only dynamic size is the batch, and the rows of this stage are counted on its own input.
                copies[node] = graph.call_function(SYM_SIZE, (placeholder, 0))
                copies[node].meta = dict(node.meta)
            else:
                copies[node] = graph.node_copy(node, copy_of)
        return copies[node]

    for node in _between(module.graph, start, end):
        if node in data:
            copy_of(node)
    graph.output(copy_of(end))
    graph.lint()
    return fx.GraphModule(module, graph)


def _between(graph: fx.Graph, start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes after `start` up to and including `end`."""
    inside = False
    for node in graph.nodes:
        if inside:
            yield node
        inside = (inside or node is start) and node is not end


def _data_nodes(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose tensors depend on the values of the input, not only on its shape."""
    data: set[fx.Node] = set()
    for node in nodes:
        depends = any(argument in data for argument in node.all_input_nodes)
        if node.op == "placeholder" or (depends and not isinstance(node.meta.get("val"), (int, torch.SymInt))):
            data.add(node)
    return data


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    found: list[fx.Node] = []

    def collect(argument: Argument) -> Argument:
        if isinstance(argument, fx.Node):
            found.append(argument)
        return argument

    fx.node.map_aggregate(graph.output_node().args, collect)
    return found


def _tensor(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _is_training(node: fx.Node) -> bool:
    """Whether an operation draws at random or uses the statistics of the batch."""
    name = getattr(node.target, "__name__", "").split(".")[0].rstrip("_")
    flag = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "batch_norm": 5}.get(name)
    return flag is not None and len(node.args) > flag and node.args[flag] is True


def _is_batch_first(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value has one row per item: only then can the rows of answered items be dropped."""
    shape, batch = node.meta["val"].shape, source.meta["val"].shape[0]
    return len(shape) > 1 and str(shape[0]) == str(batch) and not any(str(batch) in str(s) for s in shape[1:])
