"""Inputs on which a backbone is tried out, and whether its answer to a row depends on the other rows of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.errors import GraphError

_ROUNDING = 0.02
"""The largest difference that rounding in half precision may make, as a share of the range of a row's scores."""


def probe_for(graph: fx.GraphModule, inputs: Sequence[InputSpec]) -> tuple[Tensor, ...]:
    """Return (1, ...) inputs for which a backbone's scores are numbers, if there are such inputs.

    Positive inputs are tried second: a model with a square root, for example, needs them.
    """
    probes = [tuple(spec.probe(positive=positive) for spec in inputs) for positive in (False, True)]
    with torch.no_grad():
        for probe in probes:
            with contextlib.suppress(RuntimeError):  # `from_program` reports this error when it counts the FLOPs
                scores = graph(*probe)
                if bool(scores.isfinite().any()) and not bool(scores.isnan().any()):
                    return probe
    return probes[0]


def require_independent_rows(graph: fx.GraphModule, probe: tuple[Tensor, ...]) -> None:
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
            except RuntimeError:
                if number:  # the model checks the values of its inputs, and refuses these
                    continue
                raise
            _require_same(alone, graph(*(torch.cat(pair) for pair in zip(probe, other))).float())


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
    known = alone.isfinite() & together.isfinite()
    difference = torch.where(known, alone - together, 0.0).abs().amax(dim=1)
    numbers = torch.where(alone.isfinite(), alone, 0.0)
    if bool((difference > _ROUNDING * (numbers.amax(dim=1) - numbers.amin(dim=1))).any()):
        raise GraphError(f"the scores of a row differ by {float(difference.max()):.3g} if another row is in the batch: "
                         "the model computes something over the rows of a batch, such as a mean or batch statistics, "
                         "and answers must not depend on the batch")
