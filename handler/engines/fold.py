"""Rewrites a stage to compute the same in less time: batch norms are folded, and convolutions are channels_last."""

from __future__ import annotations

import copy
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument

_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.conv1d.default, _ATEN.conv1d.padding, _ATEN.conv2d.default, _ATEN.conv2d.padding,
                 _ATEN.conv3d.default, _ATEN.conv3d.padding}


def fold(stage: fx.GraphModule, *, channels_last: bool = True) -> fx.GraphModule:
    """Return a stage that computes what `stage` computes, up to rounding.

    A batch norm at inference is an affine map of each channel. If nothing else reads the convolution before it, the map
    is folded into that convolution's weight and bias. Parameters that are not rewritten are shared with `stage`.

    Args:
        stage: a part of a backbone, or all of it.
        channels_last: whether convolutions compute channels_last maps, which requires that no value of the backbone
            depends on the order of the numbers in memory. If one does, every map must keep its order, because `reshape`
            returns a copy for one order and a view for the other, and an operation in place may write through it.
    """
    module = fx.GraphModule(stage, copy.deepcopy(stage.graph))
    for node in list(module.graph.nodes):
        if node.target is _ATEN.batch_norm.default:
            _fold_batch_norm(module, node)
    for node in module.graph.nodes if channels_last else ():
        if node.target in _CONVOLUTIONS:
            _order_channels_last(module, node)
        elif node.target is _ATEN.view.default:
            node.target = _ATEN.reshape.default  # not every shape is a view of channels_last memory
    module.graph.eliminate_dead_code()
    module.graph.lint()
    return fx.GraphModule(module, module.graph)  # keeps only the parameters that are still read


def _fold_batch_norm(module: fx.GraphModule, norm: fx.Node) -> None:
    """Fold a batch norm into the convolution before it, if this convolution has known weights and no other reader."""
    convolution, *statistics = norm.args[:5]
    if not isinstance(convolution, fx.Node) or convolution.target not in _CONVOLUTIONS or len(convolution.users) > 1:
        return
    known = [constant(module, value) for value in statistics]
    weight, bias = constant(module, convolution.args[1]), constant(module, _argument(convolution, 2))
    # Biases that are computed and arguments given by name are rare, so these batch norms are not folded.
    computed = isinstance(_argument(convolution, 2), fx.Node) and bias is None
    if weight is None or known[2] is None or known[3] is None or computed or norm.kwargs or convolution.kwargs:
        return
    gamma, beta, mean, variance = (None if value is None else value.double() for value in known)
    assert mean is not None and variance is not None
    scale = (variance + float(norm.args[7])).rsqrt()  # type: ignore[arg-type]
    scale = scale if gamma is None else scale * gamma
    shift = (-mean if bias is None else bias.double() - mean) * scale
    shift = shift if beta is None else shift + beta
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    with module.graph.inserting_before(convolution):
        convolution.args = (convolution.args[0], attach(module, f"{norm.name}_weight", folded.to(weight.dtype)),
                            attach(module, f"{norm.name}_bias", shift.to(weight.dtype)), *convolution.args[3:])
    norm.replace_all_uses_with(convolution)
    module.graph.erase_node(norm)


def _order_channels_last(module: fx.GraphModule, convolution: fx.Node) -> None:
    """Store a 2-d convolution's weight channels_last: the convolution then reads and writes channels_last maps."""
    weight = constant(module, convolution.args[1])
    if weight is None or weight.dim() != 4:
        return
    ordered = weight.detach().contiguous(memory_format=torch.channels_last)
    with module.graph.inserting_before(convolution):
        convolution.update_arg(1, attach(module, f"{convolution.name}_ordered", ordered))


def attach(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Give a module a parameter and return the node that reads it."""
    setattr(module, name, nn.Parameter(value, requires_grad=False))
    return module.graph.get_attr(name)


def _argument(node: fx.Node, index: int) -> Argument:
    return node.args[index] if len(node.args) > index else None


def constant(module: fx.GraphModule, value: Argument) -> Tensor | None:
    """Return the parameter or buffer that a node reads, or None if the node is anything else."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    tensor = attrgetter(str(value.target))(module)
    return tensor.detach() if isinstance(tensor, Tensor) else None
