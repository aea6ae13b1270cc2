"""The tails of detectors that graphs in this process call, by identity, and what they return beside the scores.

A detector's graph ends in one operation that calls the detector's tail: the layers after its stages. The tails have a
module apart from that operation, because torch registers an operation only once in a process, at the first import.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import fx, nn

from early_exit.handler.archive_layout import TAIL_FILE
from early_exit.handler.backbone.image_class import DetectorSpec

TAILS: dict[str, Any] = {}


def tail_parameters(spec: DetectorSpec | None) -> list[nn.Parameter]:
    """Return the parameters of a detector's tail, or an empty list if there is no detector."""
    return [] if spec is None else list(TAILS[spec.tail].parameters())


def save_tail(spec: DetectorSpec, folder: Path) -> None:
    """Write the weights of a tail into the folder of its backbone."""
    tensors = {name: tensor.contiguous() for name, tensor in TAILS[spec.tail].state_dict().items()}
    save_file(tensors, folder / TAIL_FILE)


def keep_beside(scores: fx.Node) -> None:
    """Add nodes for the values that an operation of this package returns beside the scores; an export drops them."""
    source = _ours(scores)
    if source is None:
        return
    known = {user.args[1] for user in source.users}
    with scores.graph.inserting_after(scores):
        for index, value in enumerate(source.meta["val"]):
            if index not in known:
                node = scores.graph.call_function(operator.getitem, (source, index))
                node.meta = {**scores.meta, "val": value}


def beside(scores: fx.Node) -> tuple[fx.Node, ...]:
    """Return the values, with a row per item, that an operation of this package returns beside the scores."""
    source = _ours(scores)
    return () if source is None else tuple(node for node in source.users if node is not scores)


def _ours(scores: fx.Node) -> fx.Node | None:
    """Return the operation of this package that computes the scores among other values, if there is one."""
    if scores.target is not operator.getitem:
        return None
    source = scores.all_input_nodes[0]
    return source if getattr(source.target, "namespace", None) == "early_exit" else None
