"""The evidence of a part's records about a setting: on all requests, and on contents that were not seen before.

A certificate makes two statements about the blocks that came after all records by which the setting was chosen: at most
the tolerated share of their requests, and of their new contents, is answered differently. Each statement is tested at
delta. A setting is accepted only if both pass, so delta is not divided (Berger 1982, Multiparameter hypothesis testing
and acceptance sampling: an intersection-union test).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.handler.exits.likeness import COUNTS_FULLY
from early_exit.handler.exits.risk import Risk
from early_exit.training.selection.certify import betting_p_value, risk_p_value


@dataclass(frozen=True)
class Evidence:
    """The blocks and contents of N records, by which they count as evidence."""

    block: Tensor
    """(N,) int64: number of the block that each record is in."""
    content: Tensor
    """(N,) int64: a hash of the content of the record's request."""
    is_new: Tensor
    """(N,) bool: whether the content was first recorded in this block."""

    @classmethod
    def of_independent(cls, n: int) -> Evidence:
        """Return the evidence of N records, each with a block and a content of its own."""
        return cls(torch.arange(n), torch.arange(n), torch.ones(n, dtype=torch.bool))

    def where(self, chosen: Tensor) -> Evidence:
        """Return the evidence of the records that a (N,) bool mask chooses."""
        return Evidence(self.block[chosen], self.content[chosen], self.is_new[chosen])

    @property
    def n_contents(self) -> int:
        """The number of new contents."""
        return len(torch.unique(self.content[self.is_new]))

    @property
    def n_tested(self) -> int:
        """The number of blocks with new contents, which is the number of pieces of evidence."""
        return len(torch.unique(self.block[self.is_new]))

    @property
    def n_blocks(self) -> int:
        return len(torch.unique(self.block))

    def largest(self) -> tuple[float, float]:
        """Return the largest number of requests, and of new contents, for which a later block counts."""
        of_requests = torch.unique(self.block, return_counts=True)[1]
        of_contents = torch.unique(self._of_new(torch.zeros(len(self.block)))[1], return_counts=True)[1]
        return _quantile(of_requests), _quantile(of_contents)

    def p_value(self, risk: Risk, losses: Tensor, tolerance: float, delta: float,
                largest: tuple[float, float]) -> float:
        """Return a p-value of the hypothesis that the expected loss of requests, or of new contents, is above T.

        Args:
            risk: what the losses measure.
            losses: (N,) losses of the records.
            tolerance: T.
            delta: the level with which the p-value will be compared; it tunes the bets and nothing else.
            largest: the result of `largest` for earlier records.
        """
        of_new, blocks_of_new = self._of_new(losses.double())
        return max(_p_value(risk, losses.double(), self.block, tolerance, delta, largest[0]),
                   _p_value(risk, of_new, blocks_of_new, tolerance, delta, largest[1]))

    def _of_new(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (M,) losses of the new contents, and their (M,) blocks.

        If a content has several records, the largest of their losses counts, whatever their order.
        """
        content, index = torch.unique(self.content[self.is_new], return_inverse=True)
        lowest = torch.full((len(content),), -torch.inf, dtype=losses.dtype)
        worst = lowest.scatter_reduce(0, index, losses[self.is_new], "amax")
        block = torch.zeros(len(content), dtype=torch.int64).scatter(0, index, self.block[self.is_new])
        return worst, block


def _p_value(risk: Risk, losses: Tensor, block: Tensor, tolerance: float, delta: float, largest: float) -> float:
    _, index, n = torch.unique(block, return_inverse=True, return_counts=True)
    if not len(n):
        return 1.0
    if int(n.max()) == 1:
        return risk_p_value(risk, losses, tolerance, delta)
    span = 1 - risk.lowest
    share = (tolerance - risk.lowest) / span
    lost = torch.zeros(len(n), dtype=torch.float64).scatter_add(0, index, (losses - risk.lowest) / span)
    if lost.sum() > share * n.sum():  # what long blocks lose beyond their size that counts must not be certified away
        return 1.0
    counts = (largest / n.double()).clamp_max(1.0) / largest
    gains = (share * n - lost) * counts  # T n_b - k_b, in parts of the largest block that counts fully
    return betting_p_value((share - gains).numpy(), share, delta)


def _quantile(sizes: Tensor) -> float:
    return float(torch.quantile(sizes.double(), COUNTS_FULLY)) if len(sizes) else 1.0
