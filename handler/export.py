"""From an eager classifier to a graph of ATen operations, or a refusal that says what stands in the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import Argument

from early_exit.handler.errors import GraphError
from early_exit.handler.graph import batch_size, inputs_of, is_batch_first, tensor_of


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

    Its inputs are (B, ...) tensors in the order of the program, its output is the (B, K) scores.

    Raises:
        GraphError: it does not map (B, ...) tensors to one (B, K) tensor.
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
    training = [node.name for node in module.graph.nodes if _is_training(node)]
    if training:
        raise GraphError(f"{', '.join(training[:3])} would behave as in training: call model.eval() before exporting")
    scores = _outputs(module.graph)
    if len(scores) != 1 or tensor_of(scores[0]) is None:
        raise GraphError(f"expected a backbone that returns one tensor of scores, found {len(scores)} outputs")
    shape = tuple(scores[0].meta["val"].shape)
    if len(shape) != 2 or not is_batch_first(scores[0], batch):
        raise GraphError(f"expected scores of shape (batch, classes), found {shape}: is this a classifier?")
    # Tensors in, one tensor out, whatever structures the program was exported with.
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.output_node().args = (scores[0],)
    # A plain module: the one that torch.export returns forbids eval(), which every handler calls.
    return fx.GraphModule(module, module.graph)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    found: list[fx.Node] = []

    def collect(argument: Argument) -> Argument:
        if isinstance(argument, fx.Node):
            found.append(argument)
        return argument

    fx.node.map_aggregate(graph.output_node().args, collect)
    return found


def _is_training(node: fx.Node) -> bool:
    """Whether an operation draws at random or uses the statistics of the batch."""
    name = getattr(node.target, "__name__", "").split(".")[0].rstrip("_")
    flag = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "batch_norm": 5}.get(name)
    return flag is not None and len(node.args) > flag and node.args[flag] is True
