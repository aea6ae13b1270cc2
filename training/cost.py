"""What a plan costs: the backbone's stages and the exits between them, in FLOPs or in measured time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from early_exit.handler.candidates import CandidateLayer
from early_exit.handler.head import Head
from early_exit.handler.pooling import pooled_shape


@dataclass(frozen=True)
class Affine:
    """The cost of one step for n rows: fixed + n * per_row."""

    fixed: float
    per_row: float

    def __call__(self, n_rows: float) -> float:
        return self.fixed + n_rows * self.per_row

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.fixed + other.fixed, self.per_row + other.per_row)

    def scaled(self, factor: float) -> Affine:
        return Affine(self.fixed * factor, self.per_row * factor)


@dataclass(frozen=True)
class Costs:
    """The costs of L candidate exits, for batches of one size; a full batch through the backbone alone costs 1."""

    measure: str
    """'flops' or 'seconds'."""
    batch_size: int
    stages: tuple[Affine, ...]
    """L + 1: the backbone up to the first candidate, between candidates, and after the last."""
    exits: tuple[Affine, ...]
    """L: head, decision and shrinking after each candidate."""

    def __post_init__(self) -> None:
        sums = list(accumulate(self.stages, initial=Affine(0.0, 0.0)))
        object.__setattr__(self, "_until", sums)

    def expected(self, step: Affine, alive: float) -> float:
        """Return a step's cost for a batch of which each request still travels with probability `alive`."""
        some = 1 - (1 - alive) ** self.batch_size
        return step.fixed * some + step.per_row * alive * self.batch_size

    def between(self, start: int, end: int) -> Affine:
        """Return the stages after candidate `start` (-1: the input) up to candidate `end` (L: the output)."""
        until: Sequence[Affine] = self._until  # type: ignore[attr-defined]
        return until[end + 1] + until[start + 1].scaled(-1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Costs:
        def read(steps: Sequence[Mapping[str, float]]) -> tuple[Affine, ...]:
            return tuple(Affine(**step) for step in steps)

        return cls(data["measure"], data["batch_size"], read(data["stages"]), read(data["exits"]))


def flop_costs(layers: Sequence[CandidateLayer], heads: Sequence[float]) -> Costs:
    """Return the costs of the paper's K(S).

    Args:
        layers: the candidates.
        heads: FLOPs of each head as a fraction of the backbone's.
    """
    shares = [0.0, *(layer.cost for layer in layers), 1.0]
    return Costs("flops", 1, tuple(Affine(0.0, after - before) for before, after in pairwise(shares)),
                 tuple(Affine(0.0, head) for head in heads))


def head_flops(head: Head, shape: tuple[int, ...]) -> int:
    """Return the FLOPs of a head for one row of an activation of that shape; pooling is not counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head.classify(torch.zeros(1, *pooled_shape(pooled_shape(shape, head.spec.recorded), head.spec.pool)))
    return int(counter.get_total_flops())
