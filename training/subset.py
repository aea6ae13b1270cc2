"""Which exits to keep: the subset with the best score K(S), equation 4 of the paper, found exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CANDIDATES = 16


@dataclass(frozen=True)
class Option:
    """One candidate exit at one threshold, on N records; a mask has bit i set for record i."""

    hits: int
    """Mask of the records that would leave here."""
    wrong: int
    """Mask of those among them that would be answered differently from the backbone."""
    head_cost: float
    """C1: cost of the head."""
    cost_left: float
    """C2: cost of the backbone after this layer, in the same unit."""


@dataclass(frozen=True)
class Subset:
    """A choice of exits."""

    layers: tuple[int, ...]
    """Indices of the candidates, in order."""
    score: float
    """K(S): cost saved over all records."""
    n_wrong: int
    """Records answered differently from the backbone."""


def best_subset(option: Callable[[int, int], Option], n_layers: int, n_records: int, *,
                max_wrong: int | None = None, size: int | None = None) -> Subset:
    """Return the subset that saves most, by depth-first search; the empty subset saves 0.

    Args:
        option: gives candidate `layer` (0-based) as the `position`-th exit (1-based) of a plan.
        n_layers: number of candidates, in the order of the backbone.
        n_records: N.
        max_wrong: subsets with more differing answers are not allowed.
        size: only subsets of exactly this many exits, besides the empty one.
    """
    best = Subset((), 0.0, 0)

    def extend(chosen: tuple[int, ...], alive: int, score: float, n_wrong: int) -> None:
        nonlocal best
        if score > best.score and (size is None or len(chosen) == size):
            best = Subset(chosen, score, n_wrong)
        if len(chosen) == size:
            return
        n_alive = alive.bit_count()
        for layer in range(chosen[-1] + 1 if chosen else 0, n_layers):
            this = option(layer, len(chosen) + 1)
            # Nobody can save more than everything after this layer, and later layers have less left.
            if score + n_alive * this.cost_left <= best.score:
                return
            n_wrong_here = n_wrong + (alive & this.wrong).bit_count()
            if max_wrong is not None and n_wrong_here > max_wrong:
                continue
            n_hits = (alive & this.hits).bit_count()
            gain = n_hits * (this.cost_left - this.head_cost) - (n_alive - n_hits) * this.head_cost
            extend((*chosen, layer), alive & ~this.hits, score + gain, n_wrong_here)

    extend((), (1 << n_records) - 1, 0.0, 0)
    return best


def bit_mask(flags: Tensor) -> int:
    """Return an int with bit i set where the (N,) bool tensor is true.

    >>> bin(bit_mask(torch.tensor([True, False, True])))
    '0b101'
    """
    packed = torch.zeros(-(-len(flags) // 8) * 8, dtype=torch.uint8)
    packed[:len(flags)] = flags
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return int.from_bytes(bytes((packed.view(-1, 8) * weights).sum(dim=1).tolist()), "little")
