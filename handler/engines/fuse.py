"""Rewrites a stage for a GPU: a convolution, its bias, a sum and a ReLU become one kernel of cuDNN.

PyTorch launches one kernel for each of these operations, and each kernel reads and writes whole feature maps. On early
layers, the bias, the sum and the ReLU take longer than the convolution.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Argument

from early_exit.handler.backbone.graph import Memory
from early_exit.handler.engines.fold import attach, constant

_ATEN = torch.ops.aten
_CONVOLUTION = _ATEN.conv2d.default
_RELUS = (_ATEN.relu.default, _ATEN.relu_.default)
_SUMS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_DEFAULTS: tuple[Argument, ...] = (None, [1, 1], [0, 0], [1, 1], 1)
"""Default values of conv2d's bias, stride, padding, dilation and groups."""


def fuse(stage: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a folded stage in place and return it; the rewritten stage needs a GPU with cuDNN."""
    for relu in list(stage.graph.nodes):
        if relu.target not in _RELUS:
            continue
        before, memory = relu.args[0], Memory(stage.graph)
        if _is_convolution(before):
            if _keeps(memory, before.args[0], before, relu):
                _replace(stage, relu, before, _ATEN.cudnn_convolution_relu.default)
        elif before.target in _SUMS and len(before.users) == 1 and not before.kwargs:
            _fuse_sum(stage, relu, before, memory)
    stage.graph.lint()
    stage.recompile()
    return stage


def _fuse_sum(stage: fx.GraphModule, relu: fx.Node, total: fx.Node, memory: Memory) -> None:
    summands = {node for node in total.args if isinstance(node, fx.Node) and "val" in node.meta}
    if len(summands) < 2:
        return
    other, convolution = sorted(summands)  # the other summand must be computed before the convolution
    if not _is_convolution(convolution) or other.meta["val"].shape != convolution.meta["val"].shape:
        return
    if total.target is _ATEN.add_.Tensor and total.args[0] is other and (
            len(other.users) > 1 or memory.of[other] is not other):
        return  # another node may also read the tensor that the sum overwrites
    if not _keeps(memory, convolution.args[0], convolution, relu) or not _keeps(memory, other, total, relu):
        return
    if _is_convolution(other):
        _move_bias(stage, other, convolution)
    relu.replace_input_with(total, convolution)
    stage.graph.erase_node(total)
    _replace(stage, relu, convolution, _ATEN.cudnn_convolution_add_relu.default, other, 1.0)


def _replace(stage: fx.GraphModule, relu: fx.Node, convolution: fx.Node, fused: torch._ops.OpOverload,
             *summand: Argument) -> None:
    x, weight, *given = convolution.args
    rest = [*given, *_DEFAULTS[len(given):]]
    with stage.graph.inserting_before(relu):
        node = stage.graph.call_function(fused, (x, weight, *summand, *rest))
    node.meta = relu.meta
    relu.replace_all_uses_with(node)
    stage.graph.erase_node(relu)
    stage.graph.erase_node(convolution)


def _move_bias(stage: fx.GraphModule, source: fx.Node, target: fx.Node) -> None:
    """Move the bias of one convolution into the bias of a second, if both are known; their results must be added."""
    biases = [constant(stage, node.args[2]) if len(node.args) > 2 else None for node in (source, target)]
    if biases[0] is None or biases[1] is None:
        return
    with stage.graph.inserting_before(target):
        target.update_arg(2, attach(stage, f"{target.name}_both", biases[0] + biases[1]))
    source.update_arg(2, None)


def _keeps(memory: Memory, x: Argument, start: fx.Node, end: fx.Node) -> bool:
    """Tell whether nothing between two nodes writes to x, which is read at the second node after the fusion."""
    assert isinstance(x, fx.Node)
    return not any(start < write < end for write in memory.writes.get(memory.of[x], ()))


def _is_convolution(node: Argument) -> bool:
    """Tell whether a node is a convolution that only one other node reads."""
    return isinstance(node, fx.Node) and node.target is _CONVOLUTION and len(node.users) == 1 and not node.kwargs

