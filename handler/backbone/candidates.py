"""Candidate layers, where an exit head can be attached (the paper's section 3.1), and why other layers are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from early_exit.handler.backbone.detector_tails import beside
from early_exit.handler.backbone.graph import find_cuts
from early_exit.handler.errors import GraphError
from early_exit.handler.protocol import FULL_NAME

MIN_COST_LEFT = 0.05
"""A layer with less than this share of the FLOPs after it saves too little to be a candidate."""
SAME_COST = 0.005
"""If layers are closer together than this share of the FLOPs, only the last of them is a candidate."""
FEW = 2
"""If fewer candidates than this determine the answer alone, values that need other values beside them are candidates
too."""
LARGE_COMPONENT = 0.25
"""A module with more than this share of the FLOPs is not taken as one component; its parts are components."""

_INFERENCE_NO_OPS = {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "alias", "detach", "lift_fresh_copy"}


@dataclass(frozen=True)
class CandidateLayer:
    """A place in the backbone where a head could be attached."""

    path: str
    """Dotted path of the module with this output, as in `named_modules()`; `@2` marks the second call of a module."""
    node: str
    """Name of the value in the exported graph."""
    shape: tuple[int, ...]
    """Shape of one row: (C, H, W), (T, D) or (D,)."""
    cost: float
    """Fraction of the backbone's FLOPs that have been spent when this value is computed, in (0, 1)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CandidateLayer:
        return cls(data["path"], data["node"], tuple(data["shape"]), float(data["cost"]))


@dataclass(frozen=True)
class LeftOut:
    """A component that is not a candidate layer, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class _Component:
    path: str
    end: fx.Node
    is_no_op: bool


def discover_layers(
    module: fx.GraphModule, example: tuple[Tensor, ...]
) -> tuple[list[CandidateLayer], list[LeftOut], int]:
    """Return the candidate layers in order, the components left out, and the backbone's FLOPs per item.

    Args:
        module: the backbone's graph.
        example: (1, ...) inputs on which the FLOPs are counted.

    Raises:
        GraphError: the graph has no operation whose FLOPs can be counted.
    """
    flops = node_flops(module, example)
    total = sum(flops.values())
    if total == 0:
        raise GraphError("the backbone has no convolution, matrix product or attention whose cost could be saved")
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    spent = dict(zip(order, _running_share(flops.values(), total)))
    components = list(_components([node for node in order if node.op == "call_function"], 1, flops, total))
    components.sort(key=lambda component: order[component.end])
    cuts = find_cuts(module)
    # A detector's pyramid reads several stages, so other values pass along with the value that a head reads.
    several = bool(beside(module.graph.output_node().all_input_nodes[0]))
    layers, left_out = _candidates(components, spent, {cut.value for cut in cuts if several or not cut.others})
    if len(layers) < FEW and not several:  # the model has parallel branches to its end, or one skip around everything
        layers, left_out = _candidates(components, spent, {cut.value for cut in cuts})
    return layers, left_out, total


def _candidates(components: Sequence[_Component], spent: Mapping[fx.Node, float],
                cuts: Collection[fx.Node]) -> tuple[list[CandidateLayer], list[LeftOut]]:
    """Sort components into candidate layers and the others.

    Args:
        components: the components in the order of their ends.
        spent: for each node, the share of the FLOPs that have been spent when it is computed.
        cuts: the values at which the backbone may be cut.
    """
    layers: list[CandidateLayer] = []
    left_out: list[LeftOut] = []
    calls: Counter[str] = Counter()
    for component in components:
        cost = spent[component.end]
        value = component.end.meta.get("val")
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        if layers and component.end.name == layers[-1].node:
            continue  # the last part of a container has the same output as the container
        if component.is_no_op:
            left_out.append(LeftOut(component.path, "does nothing at inference"))
        elif component.end not in cuts:
            left_out.append(LeftOut(component.path, "its output alone does not determine the answer"))
        elif len(shape) > 3 or not all(isinstance(size, int) for size in shape):
            left_out.append(LeftOut(component.path, f"its shape {shape} is neither a map, nor tokens, nor a vector"))
        elif 1 - cost < MIN_COST_LEFT:
            left_out.append(LeftOut(component.path, f"only {1 - cost:.1%} of the FLOPs come after it"))
        else:
            if layers and cost - layers[-1].cost < SAME_COST:
                left_out.append(LeftOut(layers.pop().path, f"{component.path} follows at no cost"))
            # The second call of a module is another place in the backbone, so it needs a name of its own. So does a
            # module with the name that clients know for the whole backbone.
            calls[component.path] += 1
            is_taken = calls[component.path] > 1 or component.path == FULL_NAME
            path = component.path + (f"@{calls[component.path]}" if is_taken else "")
            layers.append(CandidateLayer(path, component.end.name, shape, cost))
    return layers, left_out


def spread_over(layers: Sequence[CandidateLayer], count: int) -> list[CandidateLayer]:
    """Return at most `count` of the layers, spread evenly over the cost of the backbone, in order."""
    if len(layers) <= count:
        return list(layers)
    free, chosen = list(layers), []
    for step in range(count):
        wanted = layers[0].cost + (layers[-1].cost - layers[0].cost) * (step + 0.5) / count
        chosen.append(min(free, key=lambda layer: abs(layer.cost - wanted)))
        free.remove(chosen[-1])
    return sorted(chosen, key=lambda layer: layer.cost)


def node_flops(module: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[fx.Node, int]:
    """Return the FLOPs of every node of a graph for one item, in graph order."""
    flops: dict[fx.Node, int] = {}
    counter = FlopCounterMode(display=False)

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            result = super().run_node(n)
            flops[n] = counter.get_total_flops() - before
            return result

    with torch.no_grad(), counter:
        Counting(module).run(*example)
    return flops


def _running_share(flops: Any, total: int) -> Iterator[float]:
    spent = 0
    for value in flops:
        spent += value
        yield spent / total


def _components(nodes: list[fx.Node], depth: int, flops: Mapping[fx.Node, int], total: int) -> Iterator[_Component]:
    """Yield the modules at a depth of the module tree. The parts of a container or a large module come before it."""
    for path, run in groupby(nodes, key=lambda node: _module_at(node, depth)):
        inside = list(run)
        if not path:
            continue  # operations written directly in the parent's forward
        is_container = ".container." in _type_at(inside[0], depth)
        is_large = sum(flops[node] for node in inside) > LARGE_COMPONENT * total
        if is_container or is_large:
            yield from _components(inside, depth + 1, flops, total)
        no_op = all(getattr(node.target, "__name__", "").split(".")[0] in _INFERENCE_NO_OPS for node in inside)
        yield _Component(path, inside[-1], no_op)


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    stack = [(path, str(kind)) for path, kind in (node.meta.get("nn_module_stack") or {}).values()]
    if stack and stack[0][1].endswith("ScoresOnly"):  # the module that `export_backbone` puts around the user's model
        return [(path.removeprefix("model").removeprefix("."), kind) for path, kind in stack[1:]]
    return stack


def _module_at(node: fx.Node, depth: int) -> str:
    stack = _stack(node)
    return stack[depth][0] if depth < len(stack) else ""


def _type_at(node: fx.Node, depth: int) -> str:
    return _stack(node)[depth][1]
