"""Whether a backbone's scores of a row depend on that row and on fixed weights alone, by its operations and by trial.

Trials show most dependences on other rows, but not those that begin at a value that none of the inputs has, nor small
random numbers. The operations show these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from early_exit.handler.backbone.export import ScoresOnly
from early_exit.handler.backbone.graph import SYM_SIZE, Memory, split, tensor_of
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.errors import GraphError, Unsupported

_ROUNDING = 0.02
"""The largest difference that rounding in half precision may make, as a share of the range of a row's scores."""
_FLAGS, _SHARES = ("train", "training"), ("dropout_p",)
"""The arguments that switch the randomness of an operation off, by False and by 0."""


def probe_for(graph: fx.GraphModule, inputs: Sequence[InputSpec]) -> tuple[Tensor, ...]:
    """Return (1, ...) inputs for which a backbone's scores are numbers, if there are such inputs.

    Positive inputs are tried second: a model with a square root, for example, needs them.
    """
    probes = [tuple(spec.probe(positive=positive) for spec in inputs) for positive in (False, True)]
    with torch.no_grad():
        for probe in probes:
            with contextlib.suppress(RuntimeError, IndexError):  # `from_program` reports it when it counts the FLOPs
                scores = graph(*probe)
                if bool(scores.isfinite().any()) and not bool(scores.isnan().any()):
                    return probe
    return probes[0]


def require_fixed_rows(graph: fx.GraphModule, probe: tuple[Tensor, ...]) -> None:
    """Check that a backbone's scores of a row depend on that row and on fixed weights alone.

    Args:
        graph: the backbone.
        probe: (1, ...) inputs.

    Raises:
        GraphError: they depend on something else.
    """
    [whole] = split(graph, [])
    memory = Memory(whole.graph)
    _require_fixed(whole.graph, memory)
    _require_independent_rows(graph, probe)
    _require_separate_rows(whole.graph, memory)


def _require_independent_rows(graph: fx.GraphModule, probe: tuple[Tensor, ...]) -> None:
    """Check that a row gets the same scores alone and beside other rows.

    If it did not, the answers of requests that stay would depend on which requests have left early.

    Args:
        graph: the backbone.
        probe: (1, ...) inputs, from which the other rows are made.

    Raises:
        GraphError: the scores differ by more than rounding.
    """
    for number, other in enumerate(zip(*map(_others, probe))):
        with torch.no_grad():
            try:
                alone = torch.cat([graph(*(x.clone() for x in row)) for row in (probe, other)]).float()
            except IndexError:  # no table has a row of such a number
                continue
            except RuntimeError:
                if number:  # the model checks the values of its inputs, and refuses these
                    continue
                raise
            _require_same(alone, graph(*(torch.cat(pair) for pair in zip(probe, other))).float())


def require_same_alone(model: nn.Module, names: Sequence[str], constants: Mapping[str, Any], output: str | None,
                       graph: fx.GraphModule, probe: tuple[Tensor, ...]) -> None:
    """Check that a single row gets the scores of the model itself, because torch.export assumes several rows.

    Args:
        model: the user's model.
        names, constants, output: as for `ScoresOnly`.
        graph: the backbone.
        probe: (1, ...) inputs.

    Raises:
        GraphError: the scores differ by more than rounding.
    """
    with torch.no_grad():
        exported = graph(*(x.clone() for x in probe)).float()
        try:  # of a single row, a model may squeeze the first dimension away
            scores_only = ScoresOnly(model, names, constants, output, lambda spec: None)
            own = scores_only(*(x.clone() for x in probe)).float().reshape_as(exported)
        except (GraphError, RuntimeError, IndexError):  # it does not take a single row, so no request can come alone
            return
    if not _is_same(own, exported):
        raise GraphError("the model treats a batch of one differently from other batches, as by 'if x.shape[0] > 1', "
                         "and answers must not depend on the batch: let it compute the same for any number of rows")


def _others(x: Tensor) -> list[Tensor]:
    """Return other inputs like a (1, ...) input: first its values in reverse order, then inputs with another mean,
    range and deviation, because a model may compute these over the whole batch."""
    flipped = x.flip(-1) if x.dim() > 1 else x
    if x.is_floating_point():
        return [flipped, 3 * flipped + 1, flipped / 3]
    if x.dtype == torch.bool or x.dim() < 2:
        return [flipped] * 3
    return [flipped, flipped // 2, x.amax() - x]  # these may be row numbers of a table, so they stay in their range


def _require_same(alone: Tensor, together: Tensor) -> None:
    if not _is_same(alone, together):
        most = float(_differences(alone, together).max())
        raise GraphError(f"the scores of a row differ by {most:.3g} if another row is in the batch: the model computes "
                         "something over the rows of a batch, such as a mean or batch statistics, and answers must not "
                         "depend on the batch")


def _is_same(scores: Tensor, others: Tensor) -> bool:
    """Tell whether two (N, K) scores of the same rows differ by rounding at most."""
    numbers = torch.where(scores.isfinite(), scores, 0.0)
    return not bool((_differences(scores, others) > _ROUNDING * (numbers.amax(dim=1) - numbers.amin(dim=1))).any())


def _differences(scores: Tensor, others: Tensor) -> Tensor:
    known = scores.isfinite() & others.isfinite()
    return torch.where(known, scores - others, 0.0).abs().amax(dim=1)


def _require_fixed(graph: fx.Graph, memory: Memory) -> None:
    """Check that a backbone answers the same request the same each time.

    Raises:
        GraphError: an operation that the scores depend on draws at random, or writes into a weight or a buffer.
    """
    for node in graph.nodes:
        if _is_random(node):
            raise GraphError(f"the model draws at random ({node.name}), so that it answers the same request "
                             "differently each time: leave that out when the model is not in training mode",
                             Unsupported.CHANGES)
    for place in memory.writes:
        if place.op == "get_attr":
            raise GraphError(f"the model writes into {place.target} while it answers, so that its answers depend on "
                             "the requests before: let it compute a new value instead", Unsupported.CHANGES)


def _require_separate_rows(graph: fx.Graph, memory: Memory) -> None:
    """Check that no value on which the scores of a backbone depend is computed from all rows of a batch.

    Raises:
        GraphError: there is such a value.
    """
    for node in _values_of_rows(graph, memory):
        value = tensor_of(node)
        if value is not None and all(isinstance(size, int) for size in value.shape):
            raise GraphError(f"the model computes one value from all rows of a batch ({node.name} of shape "
                             f"{tuple(value.shape)}), such as a mean, a largest value or a condition, and answers must "
                             "not depend on the batch: compute it for each row, as in x.amax(dim=(1, 2, 3))")


def _values_of_rows(graph: fx.Graph, memory: Memory) -> list[fx.Node]:
    """Return the nodes whose values depend on the values of the inputs, in order."""
    found: set[fx.Node] = set()
    before = -1
    while before < len(found):  # a later write also changes earlier nodes that share the memory
        before = len(found)
        for node in graph.nodes:
            if node.op == "placeholder" or (not _needs_shapes_only(node) and (
                    memory.of[node] in found or any(read in found for read in node.all_input_nodes))):
                found.add(node)
        for place, writes in memory.writes.items():
            if any(write in found for write in writes):
                found.add(place)
    return [node for node in graph.nodes if node in found]


def _needs_shapes_only(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    return node.target is SYM_SIZE or name.startswith(("new_", "sym_")) or name.endswith("_like")


def _is_random(node: fx.Node) -> bool:
    """Tell whether an operation draws at random, as it is called here."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given: dict[str, Any] = {described.name: node.args[index] if index < len(node.args) else
                             node.kwargs.get(described.name, described.default_value)
                             for index, described in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]
    return not any(given.get(name) is False for name in _FLAGS) and not any(
        name in given and not given[name] for name in _SHARES)
