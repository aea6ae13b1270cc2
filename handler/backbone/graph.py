"""The backbone as a graph of ATen operations: find its cuts, split it into stages."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from early_exit.handler.backbone.detector_tails import beside
from early_exit.handler.errors import GraphError

SYM_SIZE = torch.ops.aten.sym_size.int
LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.padding_idx)
_KEEP_VALUES = ("to", "_to_copy", "view", "reshape", "flatten", "unflatten", "slice", "select", "squeeze", "unsqueeze",
                "transpose", "permute", "expand", "clone", "contiguous", "detach", "clamp", "masked_fill")
"""Names of operations whose results have no values that their first input has not, apart from bounds and fillers."""
_WEIGHTS = "weights"
_HIDDEN_VIEWS = ("dropout", "einsum", "atleast_", "meshgrid", "broadcast_tensors", "cartesian_prod", "unsafe_chunk",
                 "unsafe_split", "type_as", "sum_to_size", "conj_physical")
"""Parts of the names of operations that may return the memory of an input although their schemas do not tell so."""
_VIEWS_OF_EACH = ("atleast_", "meshgrid", "broadcast_tensors")
"""Those of them that take a list of tensors and return a list with a view of each."""


@dataclass(frozen=True)
class Cut:
    """A place at which the graph can be cut, and the tensors from which the rest of the backbone is computed.

    Each of these tensors has one row per item of the batch, so that the rows of answered items can be dropped.
    """

    value: fx.Node
    """The value that is computed last, which a head at this place reads."""
    others: tuple[fx.Node, ...]
    """Further results that are still needed; empty if the value alone determines the answer."""
    inputs: tuple[fx.Node, ...]
    """Inputs that are still needed, such as a mask. Values that follow from them without parameters are recomputed."""

    @property
    def live(self) -> tuple[fx.Node, ...]:
        """The tensors that pass the cut, in the order of the next stage's inputs."""
        return (self.value, *self.others, *self.inputs)


def find_cuts(module: fx.GraphModule) -> list[Cut]:
    """Return the places where a backbone can be cut, in order of computation.

    A cut without `others` meets the paper's condition (section 3.1): the answer depends on its value alone, apart from
    inputs, which are known anyway. Parameters are ignored, and so are values that follow from parameters and shapes
    alone, because any stage can recompute them.
    """
    return _Dependence(module).cuts()


def split(module: fx.GraphModule, boundaries: Sequence[str]) -> list[fx.GraphModule]:
    """Split a backbone at cuts into stages.

    Args:
        module: the graph of a backbone, tensors to scores.
        boundaries: names of the cuts' values, in order of computation.

    Returns:
        len(boundaries) + 1 graph modules. The first takes the backbone's inputs as arguments, and each of the others
        takes the tensors that the stage before it returned. A stage returns a tuple of tensors, of which a head reads
        the first. The last stage returns a tuple of the scores and the values beside them, such as a detector's boxes.
        One after the other, the stages compute exactly what `module` computes, for any number of rows, and rows may be
        dropped between two stages.

    Raises:
        GraphError: a boundary is not a cut of this graph.
    """
    known = _Dependence(module)
    by_name = {cut.value.name: cut for cut in known.cuts()}
    unknown = [name for name in boundaries if name not in by_name]
    if unknown:
        raise GraphError(f"the backbone cannot be cut at {', '.join(unknown)}")
    cuts = [by_name[name] for name in boundaries]
    scores = module.graph.output_node().args[0]
    if not isinstance(scores, fx.Node):
        raise GraphError(f"expected a backbone that returns one tensor of scores, found {scores}")
    starts = [known.inputs, *(cut.live for cut in cuts)]
    ends = [*starts[1:], (scores, *beside(scores))]
    return [known.stage(start, end) for start, end in zip(starts, ends)]


class Memory:
    """The memory of the values of a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.of: dict[fx.Node, fx.Node] = {}
        """For each node, the node that allocated its memory. If the node is a view, this is another node."""
        self.viewed: dict[fx.Node, fx.Node] = {}
        """For each view, the node that it is a view of; for an operation in place, the node that it changes."""
        self.writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        """For each node that allocated memory, the operations that write to this memory."""
        for node in graph.nodes:
            self.of[node] = node
            self._note(node)

    def _note(self, node: fx.Node) -> None:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            if node.op == "call_function" and node.all_input_nodes:  # an element of a list of views
                self._view(node, _viewed_by_element(node))
            return
        is_view = any(value.alias_info is not None for value in schema.returns)
        is_hidden = any(name in str(node.target) for name in _HIDDEN_VIEWS)
        for index, described in enumerate(schema.arguments):
            argument = node.args[index] if index < len(node.args) else node.kwargs.get(described.name)
            if is_hidden and isinstance(argument, list) and len(argument) == 1:
                [argument] = argument  # einsum returns a view of a single tensor, but computes a new one from several
            is_shown = is_hidden and described.name != "other"  # of which `type_as` reads only the dtype
            if isinstance(argument, fx.Node) and (is_shown or (is_view and described.alias_info is not None)):
                self._view(node, argument)
            if isinstance(argument, fx.Node) and described.alias_info is not None and described.alias_info.is_write:
                self.writes[self.of[argument]].append(node)

    def _view(self, node: fx.Node, viewed: fx.Node) -> None:
        self.of[node], self.viewed[node] = self.of[viewed], viewed


def _viewed_by_element(element: fx.Node) -> fx.Node:
    """Return the tensor that an element of a list of views shows, or the list if all of them show one tensor."""
    views, position = element.all_input_nodes[0], element.args[-1]
    shown = views.args[0] if views.args else None
    is_one_of_each = any(name in str(views.target) for name in _VIEWS_OF_EACH)
    if is_one_of_each and isinstance(shown, list) and isinstance(position, int):
        viewed: fx.Node = shown[position]
        return viewed
    return views


class _Dependence:
    """The dependences between the nodes of a graph."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.inputs = tuple(inputs_of(module.graph))
        self._batch = batch_size(module.graph)
        memory = Memory(module.graph)
        self._memory, self._writes = memory.of, memory.writes
        origins = self._origins()
        self.data = {node for node in self.nodes if not origins[node] <= {_WEIGHTS}}
        """Nodes that depend on the values of the inputs, not only on their shapes."""
        self.light = {node: origins[node] for node in self.data
                      if _WEIGHTS not in origins[node] and str(self._batch) in str(node.meta.get("val"))}
        """The nodes of `data` that need no parameters and have a batch dimension, with the inputs they follow from."""
        self.last_use = {node: max((self.position[user] for user in node.users), default=-1) for node in self.data}

    def cuts(self) -> list[Cut]:
        """Return the places where the graph can be cut, in order of computation."""
        cuts: list[Cut] = []
        alive: list[fx.Node] = []
        for index, node in enumerate(self.nodes):
            if node.op == "output":
                break
            if node in self.data:
                alive.append(node)
            alive = [value for value in alive if self.last_use[value] > index]
            if node not in alive or node in self.light:
                continue
            sources = {source for value in alive if value in self.light for source in self.light[value]}
            others = tuple(value for value in alive if value is not node and value not in self.light)
            cut = Cut(node, others, tuple(source for source in self.inputs if source in sources))
            has_rows = all(tensor_of(value) is not None and is_batch_first(value, self._batch) for value in cut.live)
            if has_rows and len(node.meta["val"].shape) > 1 and not self._shares_changing_memory(cut, index):
                cuts.append(cut)
        return cuts

    def _shares_changing_memory(self, cut: Cut, index: int) -> bool:
        """Tell whether an operation after `index` writes to memory that two of the cut's tensors share."""
        seen = [self._memory[node] for node in cut.live]
        shared = {memory for memory in seen if seen.count(memory) > 1}
        return any(self.position[write] > index for memory in shared for write in self._writes[memory])

    def stage(self, start: Sequence[fx.Node], end: Sequence[fx.Node]) -> fx.GraphModule:
        """Return the part of the graph that computes `end` from `start`."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in start:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        rows = copies[start[0]]
        for node in self._needed(start, end):
            if node.target is SYM_SIZE:
                # The only dynamic size is that of the batch, and a stage counts the rows of its own first input.
                copies[node] = self._count(graph, rows, node)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in end))
        graph.lint()
        return fx.GraphModule(self.module, graph)

    def _needed(self, start: Sequence[fx.Node], end: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the nodes of a stage in order, including those that it must recompute."""
        first, last = self.position[start[0]], self.position[end[0]]
        seen: set[fx.Node] = set()
        missing = list(end)
        while missing:
            node = missing.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.target is SYM_SIZE:
                continue
            travels = self._memory[node] in self.data and self._memory[node] not in self.light
            missing += [write for write in self._writes[self._memory[node]]
                        if self.position[write] <= last and not (travels and self.position[write] <= first)]
            if node not in start:
                missing += node.all_input_nodes
        return sorted(seen - set(start), key=self.position.__getitem__)

    def _origins(self) -> dict[fx.Node, frozenset[object]]:
        """Return the inputs that each node depends on, with `_WEIGHTS` if it also depends on parameters."""
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        memory_written_by = {write: memory for memory, writes in self._writes.items() for write in writes}
        origins: dict[fx.Node, frozenset[object]] = {}
        written: dict[fx.Node, frozenset[object]] = defaultdict(frozenset)
        changed = True
        while changed:  # a later write also affects earlier nodes that share the memory
            changed = False
            for node in self.nodes:
                if node.op == "placeholder":
                    read: frozenset[object] = frozenset((node,))
                elif node.target is SYM_SIZE:
                    read = frozenset()
                else:
                    weights = {_WEIGHTS} if node.op == "get_attr" and node.target in parameters else set()
                    read = written[self._memory[node]].union(weights, *map(origins.__getitem__, node.all_input_nodes))
                memory = memory_written_by.get(node)
                if memory is not None:
                    written[memory] |= read
                changed = changed or origins.get(node) != read
                origins[node] = read
        return origins

    def _count(self, graph: fx.Graph, rows: fx.Node, size: fx.Node) -> fx.Node:
        """Add a dynamic size to a stage: the number of the stage's rows, or a multiple of that number."""
        times = size.meta["val"].node.expr / self._batch.node.expr  # type: ignore[union-attr]
        count = graph.call_function(SYM_SIZE, (rows, 0))
        if times == 1:
            return count
        if not times.is_integer:
            raise GraphError(f"{size.name} is {size.meta['val']}, expected a multiple of the batch")
        return graph.call_function(operator.mul, (count, int(times)))


def inputs_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def batch_size(graph: fx.Graph) -> int | torch.SymInt:
    """Return the number of rows that the graph was exported for; it is a symbol if any number is allowed."""
    size: int | torch.SymInt = inputs_of(graph)[0].meta["val"].shape[0]
    return size


def reads_inputs(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that depend on the values of the inputs, not on parameters and shapes alone."""
    return _Dependence(module).data


def index_limits(module: fx.GraphModule) -> dict[str, int]:
    """Return, for each input that looks up rows of tables, the number of rows of the smallest table, by input name.

    Inputs from which the numbers of the rows are computed are left out, such as a mask that is summed to positions.
    """
    limits: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.target in LOOKUPS:
            table, indices = node.all_input_nodes[:2]
            while getattr(indices.target, "__name__", "").partition(".")[0] in _KEEP_VALUES:
                indices = indices.all_input_nodes[0]
            if indices.op == "placeholder":
                n_rows = int(table.meta["val"].shape[0])
                limits[indices.name] = min(n_rows, limits.get(indices.name, n_rows))
    return limits


def tensor_of(node: fx.Node) -> Tensor | None:
    """Return a tensor without values that has the shape and dtype of a node's result, or None if it is no tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_batch_first(node: fx.Node, batch: int | torch.SymInt) -> bool:
    """Tell whether a value has one row per item: only then can the rows of answered items be dropped."""
    shape = node.meta["val"].shape
    return len(shape) > 0 and str(shape[0]) == str(batch) and not any(str(batch) in str(s) for s in shape[1:])
