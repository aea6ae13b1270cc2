"""Finds the subset of candidates that costs least as exits (equation 4 of the paper, K(S))."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from early_exit.training.costs.cost import Costs

MAX_EXACT = 16
_LOSS_BITS = 10


@dataclass(frozen=True)
class Option:
    """One candidate exit at one threshold, on N records; a mask has bit i set for record i."""

    hits: int
    """The mask of the records that would leave here."""
    loss: tuple[tuple[float, int], ...]
    """The losses of the records that would leave, as weighted masks: a record loses the sum of its masks' weights."""


@dataclass(frozen=True)
class Subset:
    """The candidates that become exits, and what they cost."""

    layers: tuple[int, ...]
    """The indices of the candidates, in order."""
    cost: float
    """The mean cost of a request as a fraction of the backbone's; 1 - K(S) / N where cost counts FLOPs."""


def best_subset(option: Callable[[int, int], Option], costs: Costs, n_records: int, *, max_loss: float | None = None,
                size: int | None = None, among: Sequence[int] | None = None,
                best: Subset = Subset((), 1.0)) -> Subset:
    """Return the subset that costs least, by depth-first search; the empty subset costs 1.

    Args:
        option: gives candidate `layer` (0-based) as the `position`-th exit (1-based) of a plan.
        costs: the costs of the candidates, in the order of the backbone.
        n_records: N.
        max_loss: subsets that lose more over all records are not allowed.
        size: only subsets of exactly this many exits, besides the empty one.
        among: candidates to choose from; all by default.
        best: a subset that is returned unless another one costs less; the better it is, the faster the search.
    """
    n_layers = costs.n_layers
    open_to = sorted(among) if among is not None else list(range(n_layers))

    def extend(chosen: tuple[int, ...], alive: int, spent: float, lost: float) -> None:
        nonlocal best
        last = chosen[-1] if chosen else -1
        here = costs.at(alive.bit_count() / n_records)
        total = spent + here.between(last, n_layers)
        if total < best.cost and (size is None or len(chosen) == size):
            best = Subset(chosen, total)
        if len(chosen) == size:
            return
        for layer in open_to:
            if layer <= last:
                continue
            reached = spent + here.between(last, layer)
            if reached >= best.cost:
                return  # later candidates cost even more to reach
            reached += here.exits[layer]
            if reached >= best.cost:
                continue
            this = option(layer, len(chosen) + 1)
            lost_here = lost + sum(weight * (alive & mask).bit_count() for weight, mask in this.loss)
            if max_loss is None or lost_here <= max_loss:
                extend((*chosen, layer), alive & ~this.hits, reached, lost_here)

    extend((), (1 << n_records) - 1, 0.0, 0.0)
    return best


def improved_subset(option: Callable[[int, int], Option], costs: Costs, n_records: int, *,
                    max_loss: float | None = None, best: Subset = Subset((), 1.0)) -> Subset:
    """Return the best subset of up to 16 candidates. For more candidates, return a good subset that is found in steps.

    Each step searches exactly among 16 candidates: the exits chosen so far, and some of the others in turn.
    """
    n_layers = costs.n_layers
    if n_layers <= MAX_EXACT:
        return best_subset(option, costs, n_records, max_loss=max_loss, best=best)
    spread = [round(index * (n_layers - 1) / (MAX_EXACT - 1)) for index in range(MAX_EXACT)]
    best = best_subset(option, costs, n_records, max_loss=max_loss, among=spread, best=best)
    improved = True
    while improved:
        improved = False
        others = [layer for layer in range(n_layers) if layer not in best.layers]
        room = max(1, MAX_EXACT - len(best.layers))
        for offset in range(-(-len(others) // room)):
            among = [*best.layers, *others[offset::-(-len(others) // room)]]
            better = best_subset(option, costs, n_records, max_loss=max_loss, among=among, best=best)
            if better.cost < best.cost:
                best, improved = better, True
                break
    return best


def bit_mask(flags: Tensor) -> int:
    """Return an int with bit i set where the (N,) bool tensor is true.

    >>> bin(bit_mask(Tensor([1, 0, 1]).bool()))
    '0b101'
    """
    return int.from_bytes(np.packbits(flags.numpy(), bitorder="little").tobytes(), "little")


def loss_masks(losses: Tensor) -> tuple[tuple[float, int], ...]:
    """Return (N,) losses in [-1, 1] as weighted masks, rounded to 1/1024.

    >>> loss_masks(Tensor([1.0, 0.0, 0.25]))
    ((1.0, 1), (0.25, 4))
    """
    steps = (losses.abs() * 2**_LOSS_BITS).round().int().numpy()
    masks = []
    for sign, chosen in ((1.0, (losses > 0).numpy()), (-1.0, (losses < 0).numpy())):
        bits = (np.where(chosen, steps, 0) >> np.arange(_LOSS_BITS, -1, -1)[:, None]) & 1
        for place, packed in enumerate(np.packbits(bits.astype(bool), axis=1, bitorder="little")):
            if packed.any():
                masks.append((sign * 2.0**-place, int.from_bytes(packed.tobytes(), "little")))
    return tuple(masks)
