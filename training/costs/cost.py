"""What a plan costs: the backbone's stages and the exits between them, in FLOPs or in measured time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from scipy.special import bdtr
from torch.utils.flop_counter import FlopCounterMode

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.backbone.pooling import pooled_shape
from early_exit.handler.exits.head import Head


@dataclass(frozen=True)
class StepCosts:
    """The mean costs of L candidate exits for one share of requests that are still in the batch."""

    until: tuple[float, ...]
    """L + 2 numbers: number k, counted from 0, is the cost of the first k stages; the last is the whole backbone's."""
    exits: tuple[float, ...]
    """L numbers: the cost of head, decision and shrinking after each candidate."""

    def between(self, start: int, end: int) -> float:
        """Return the cost of the stages after candidate `start` (-1: input) up to candidate `end` (L: output)."""
        return self.until[end + 1] - self.until[start + 1]


@dataclass(frozen=True)
class Costs:
    """The costs of L candidate exits, for batches of one size B; a full batch through the backbone alone costs 1."""

    measure: str
    """What the costs count: 'flops' or 'seconds'."""
    batch_size: int
    stages: np.ndarray
    """(L + 1, B + 1): the cost of each stage, up to, between and after the candidates, for 0 to B rows."""
    exits: np.ndarray
    """(L, B + 1): the cost of head, decision and shrinking after each candidate, for 0 to B rows."""
    _known: dict[float, StepCosts] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_layers(self) -> int:
        return len(self.exits)

    @property
    def saved(self) -> tuple[float, ...]:
        """For each candidate, the share of the backbone that a full batch saves by leaving after it."""
        full = self.at(1.0)
        return tuple(full.between(layer, self.n_layers) for layer in range(self.n_layers))

    def at(self, alive: float) -> StepCosts:
        """Return the mean costs if each request of a full batch is still in the batch with probability `alive`."""
        if alive not in self._known:
            chances = np.diff(bdtr(np.arange(self.batch_size + 1), self.batch_size, alive), prepend=0.0)
            until = np.concatenate([[0.0], np.cumsum(self.stages @ chances)])
            self._known[alive] = StepCosts(tuple(until.tolist()), tuple((self.exits @ chances).tolist()))
        return self._known[alive]


def flop_costs(layers: Sequence[CandidateLayer], heads: Sequence[float]) -> Costs:
    """Return the costs as in the paper's K(S).

    Args:
        layers: the candidates.
        heads: FLOPs of each head as a fraction of the backbone's.
    """
    shares = [0.0, *(layer.cost for layer in layers), 1.0]
    stages = [after - before for before, after in pairwise(shares)]
    return Costs("flops", 1, np.array([[0.0, share] for share in stages]),
                 np.array([[0.0, head] for head in heads]).reshape(-1, 2))


@dataclass(frozen=True)
class FlopCost:
    """The cost of a head as a fraction of the backbone's FLOPs."""

    flops: int
    """The FLOPs of the backbone."""

    def __call__(self, head: Head, layer: CandidateLayer) -> float:
        return head_flops(head, layer.shape) / self.flops


def head_flops(head: Head, shape: tuple[int, ...]) -> int:
    """Return the FLOPs of a head for one row of an activation of that shape; pooling is not counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head.classify(torch.zeros(1, *pooled_shape(pooled_shape(shape, head.spec.recorded), head.spec.pool)))
    return int(counter.get_total_flops())
