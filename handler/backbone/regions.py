"""Inlining of subgraphs: operations that torch.export keeps apart from the graph, such as those under autocast.

Cuts and candidate layers are found between the operations of one graph. A model whose forward begins with
`with torch.autocast(...)` is exported as a single operation that holds all others in a subgraph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument
from torch.utils._python_dispatch import TorchDispatchMode

from early_exit.handler.errors import GraphError

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
_FIRST_INPUT = {_AUTOCAST: 5, _GRADIENTS: 2}
"""For each operation that holds a subgraph, the index of its first input; the argument before that is the subgraph."""
_CAST = torch.ops.aten.to.dtype
_ANY_CAST = torch.ops.aten._to_copy.default
"""The operation that every cast is executed as."""


@dataclass(frozen=True)
class _Autocast:
    """The settings of one `torch.autocast` block."""

    device: str
    dtype: torch.dtype | None
    enabled: bool

    def entered(self) -> Any:
        # With autocast's cache, a cast that was observed once would not be observed again.
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)

    def knows(self, operation: Any) -> bool:
        """Tell whether autocast casts the arguments of this operation, and nothing inside it."""
        return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), f"Autocast{self.device.upper()}")


def inline_regions(program: ExportedProgram) -> None:
    """Put the operations of subgraphs into the program's graph, in place.

    Blocks that switch gradients have no effect at inference. The casts that autocast makes become operations, so that
    the program computes the same without autocast, on every device and with any cuts.

    Raises:
        GraphError: a subgraph reads a tensor that is not among its inputs.
    """
    module, graph = program.graph_module, program.graph_module.graph
    calls = [node for node in graph.nodes if node.target in _FIRST_INPUT]
    for call in calls:
        with graph.inserting_before(call):
            results = _inlined(module, graph, call, call.args, ())
        for user in list(call.users):
            result = results[user.args[1]]
            program.graph_signature.replace_all_uses(user.name, result.name)
            user.replace_all_uses_with(result)
            graph.erase_node(user)
        graph.erase_node(call)
    if calls:
        graph.eliminate_dead_code()
        graph.lint()
        module.delete_all_unused_submodules()
        module.recompile()


def _inlined(owner: fx.GraphModule, graph: fx.Graph, call: fx.Node, arguments: Sequence[Argument],
             around: Sequence[_Autocast]) -> list[fx.Node]:
    """Add the operations of a subgraph to a graph, and return the nodes of its results.

    Args:
        owner: the module that has the subgraph.
        graph: the graph into which the operations are inserted.
        call: the operation of the owner's graph that holds the subgraph.
        arguments: the arguments of this operation, with nodes of `graph` as inputs.
        around: the autocast blocks around this operation, outermost first.
    """
    first = _FIRST_INPUT[call.target]  # type: ignore[index]
    inside = around if call.target is _GRADIENTS else (*around, _Autocast(*arguments[:3]))  # type: ignore[arg-type]
    region = owner.get_submodule(str(call.args[first - 1].target))  # type: ignore[union-attr]
    assert isinstance(region, fx.GraphModule)
    copies: dict[fx.Node, Any] = {}
    inputs = iter(arguments[first:])
    for node in region.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op == "output":
            return [copies[result] for result in node.args[0]]
        elif node.op == "get_attr":
            if not isinstance(getattr(region, node.target, None), fx.GraphModule):
                raise GraphError(f"a part of the model under autocast or no_grad reads {node.target}, which is not "
                                 "among its inputs: move the block out of forward, or make that tensor a buffer")
            copies[node] = node
        elif node.target in _FIRST_INPUT:
            copies[node] = _inlined(region, graph, node, fx.map_arg(node.args, copies.__getitem__), inside)
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], list):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = _copied(graph, node, copies, inside)
    raise GraphError(f"the subgraph of {call.name} returns nothing: export the program again")


def _copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any], around: Sequence[_Autocast]) -> fx.Node:
    """Add one operation to a graph, with casts, so that it computes the same as in its autocast blocks."""
    operation = _Operation.of(node, copies)
    if not around or not isinstance(node.target, torch._ops.OpOverload):
        return graph.node_copy(node, copies.__getitem__)
    with FakeTensorMode(allow_non_fake_inputs=True):  # an operation may create scalars itself
        examples = [_example(value.meta["val"]) for value in operation.given]
    within = operation.observed(examples, around)
    casts = {}
    if any(block.knows(node.target) for block in around):
        lowered = [value.to(within.casts[place]) if place in within.casts else value
                   for place, value in enumerate(examples)]
        is_whole = operation.observed(lowered, ()).parts == within.parts
        casts = {operation.given[place]: dtype for place, dtype in within.casts.items()}
    else:
        is_whole = not within.has_inner_casts
    if not is_whole:
        return _decomposed(graph, operation, around)
    cast = {value: _cast(graph, value, dtype, node) for value, dtype in casts.items()}
    return graph.node_copy(node, lambda value: cast.get(copies[value], copies[value]))


@dataclass(frozen=True)
class _Operation:
    """An operation of a subgraph."""

    node: fx.Node
    arguments: tuple[Any, Any]
    """The positional and the named arguments, with nodes of the graph into which the operation is copied."""
    given: tuple[fx.Node, ...]
    """The nodes among the arguments, each once."""

    @classmethod
    def of(cls, node: fx.Node, copies: dict[fx.Node, Any]) -> _Operation:
        arguments = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        given: dict[fx.Node, None] = {}
        fx.map_arg(arguments, given.setdefault)
        return cls(node, arguments, tuple(given))

    def run(self, values: Sequence[Any], around: Sequence[_Autocast]) -> Any:
        """Return the result of the operation inside autocast blocks, for values of the nodes in `given`."""
        args, kwargs = fx.map_arg(self.arguments, dict(zip(self.given, values)).__getitem__)
        with torch.no_grad(), ExitStack() as stack:
            for block in around:
                stack.enter_context(block.entered())
            return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def observed(self, values: Sequence[Any], around: Sequence[_Autocast]) -> _Observer:
        """Run the operation and return the observed casts and parts."""
        observer = _Observer(values)
        with observer:
            self.run(values, around)
        return observer


def _example(value: Any) -> Any:
    """Return a tensor or a size with fixed sizes: running operations on symbolic sizes could narrow the symbols."""
    if isinstance(value, Tensor):
        return torch.empty_strided([_example(size) for size in value.shape],
                                   [_example(stride) for stride in value.stride()],
                                   dtype=value.dtype, device=value.device)
    return value.node.hint if isinstance(value, torch.SymInt) else value


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Observes the operations that an operation is executed as, including the casts of autocast."""

    def __init__(self, tensors: Sequence[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = tensors
        self.casts: dict[int, torch.dtype] = {}
        """The dtype that each tensor was cast to, by its position in `tensors`."""
        self.parts: list[tuple[object, tuple[object, ...]]] = []
        """Every other operation, with the dtypes of its results."""

    @property
    def has_inner_casts(self) -> bool:
        """Whether there are casts among several parts; a cast that is alone is the model's own."""
        return len(self.parts) + len(self.casts) > 1 and (
            bool(self.casts) or any(part is _ANY_CAST for part, _ in self.parts))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        places = [place for place, tensor in enumerate(self._tensors) if args and tensor is args[0]]
        if func is _ANY_CAST and places:
            self.casts |= dict.fromkeys(places, result.dtype)
        elif func.namespace != "prim":  # operations of `prim` only query properties of tensors
            results = result if isinstance(result, (tuple, list)) else (result,)
            self.parts.append((func, tuple(getattr(value, "dtype", None) for value in results)))
        return result


def _cast(graph: fx.Graph, value: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
    cast = graph.call_function(_CAST, (value, dtype))
    cast.meta = {**reader.meta, "val": value.meta["val"].to(dtype)}
    return cast


def _decomposed(graph: fx.Graph, operation: _Operation, around: Sequence[_Autocast]) -> fx.Node:
    """Add the parts of an operation, such as an einsum, in which autocast casts inner values."""
    values = [value.meta["val"] for value in operation.given]
    traced = make_fx(lambda *values: operation.run(values, around), tracing_mode="symbolic")(*values)
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), operation.given))
    for part in traced.graph.nodes:
        if part.op == "output":
            return copies[part.args[0]]
        if part.op != "placeholder":
            copies[part] = graph.node_copy(part, copies.__getitem__)
            copies[part].meta = {**operation.node.meta, **part.meta}
    raise GraphError(f"{operation.node.name} returns nothing: export the program again")
