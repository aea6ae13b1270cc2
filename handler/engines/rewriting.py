"""Tells whether a backbone computes the same if the order of the numbers in memory, or the dtypes, are rewritten.

An operation such as `reshape` returns a view for one order of the numbers and a copy for another one. If an operation
in place then writes to the one tensor and the other is read afterwards, the values depend on the order.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from early_exit.handler.backbone.graph import Memory

_ATEN = torch.ops.aten
_BY_ORDER = frozenset({_ATEN.view, _ATEN.view_as, _ATEN.reshape, _ATEN.reshape_as, _ATEN.flatten, _ATEN.ravel,
                       _ATEN.contiguous})
"""The operations whose result is a view or a copy depending on the order. A `view` is among them, because for most
orders it must become a `reshape`."""
_BY_DTYPE = frozenset({_ATEN.to})
"""The operations whose result is their input or a copy depending on the dtype of the input."""


def reads_order(graph: fx.Graph) -> bool:
    """Tell whether values depend on the order of the numbers in memory, which channels_last changes."""
    return any(_kind(node) is _ATEN.as_strided for node in graph.nodes) or _writes_across(graph, _BY_ORDER)


def needs_casts(graph: fx.Graph) -> bool:
    """Tell whether values depend on whether casts return copies, which they do not if all floats have one dtype."""
    return _writes_across(graph, _BY_DTYPE)


def _writes_across(graph: fx.Graph, operations: Container[object]) -> bool:
    """Tell whether a value depends on whether one of some operations returns a view or a copy."""
    memory, position = Memory(graph), {node: index for index, node in enumerate(graph.nodes)}
    return any(_is_written_across(node, memory, position) for node in graph.nodes if _kind(node) in operations)


def _is_written_across(node: fx.Node, memory: Memory, position: dict[fx.Node, int]) -> bool:
    """Tell whether an operation writes to one side of a possible view, and the other side is read afterwards."""
    shared = memory.of[node]
    later = [write for write in memory.writes.get(shared, ()) if position[write] > position[node]]
    views = {node}
    for other in position if later else ():
        if memory.viewed.get(other) in views:
            views.add(other)
    others = {other for other, allocated in memory.of.items() if allocated is shared} - views
    for write in later:
        for written, unwritten in ((views, others), (others, views)):
            last_read = max((position[user] for other in unwritten for user in other.users), default=-1)
            # An operation that writes and returns nothing may have written to either side.
            if (write in written or memory.of[write] is not shared) and last_read > position[write]:
                return True
    return False


def _kind(node: fx.Node) -> object:
    """Return the operation of a node, whatever its overload; None for a node that is no operation of torch."""
    return getattr(node.target, "overloadpacket", None)
