"""The evidence of a part's records about a setting: on all requests, and on contents that were not seen before.

A certificate makes two statements about the blocks that came after all records on which the setting was chosen: at most
the tolerated share of their requests is answered differently, and at most the tolerated share of their new contents.
Each statement is tested at delta. A setting is accepted only if both pass, so delta is not divided (Berger 1982,
Multiparameter hypothesis testing and acceptance sampling: an intersection-union test).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from early_exit.handler.errors import TooFewRecordsError
from early_exit.handler.exits.likeness import COUNTS_FULLY
from early_exit.handler.exits.risk import Risk
from early_exit.training.selection.certify import betting_p_value, risk_p_value

ONE_RECORD = (1.0, 1.0)
"""The largest numbers of requests and of new contents in a block, if each record is a block of its own."""


@dataclass(frozen=True)
class Evidence:
    """The blocks and contents of N records. They determine how much evidence the records are."""

    block: Tensor
    """(N,) int64: number of the block that each record is in."""
    content: Tensor
    """(N,) int64: a hash of the content of the record's request."""
    is_new: Tensor
    """(N,) bool: whether the content was first recorded in this block."""
    largest: tuple[float, float] = ONE_RECORD
    """The numbers of requests and of new contents up to which a block counts fully; a larger block counts no more. They
    must be fixed on earlier records."""
    expected: tuple[float, float] | None = None
    """The numbers of blocks, and of blocks with new contents, that earlier records suggest; None for the actual ones.
    Bets are tuned to these numbers, because a bet must not depend on the records on which it is placed."""

    @classmethod
    def of_independent(cls, n: int) -> Evidence:
        """Return the evidence of N records, each with a block and a content of its own."""
        return cls(torch.arange(n), torch.arange(n), torch.ones(n, dtype=torch.bool))

    def where(self, chosen: Tensor) -> Evidence:
        """Return the evidence of the records that a (N,) bool mask chooses."""
        return replace(self, block=self.block[chosen], content=self.content[chosen], is_new=self.is_new[chosen])

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

    @property
    def in_blocks(self) -> bool:
        """Whether any piece of evidence consists of several records."""
        return len(_sizes(self._block_with_repeats)) < len(self.block)

    def after(self, before: Evidence) -> Evidence:
        """Return this evidence with the size and the number of blocks that earlier records suggest."""
        blocks = before._block_with_repeats, before._blocks_of_new()
        more = len(self.block) / max(1, len(before.block))
        of_requests, of_new = (max(1.0, more * len(_sizes(block))) for block in blocks)
        return replace(self, largest=before.sizes(), expected=(of_requests, of_new))

    def sizes(self) -> tuple[float, float]:
        """Return the numbers of requests, and of new contents, that most blocks do not exceed."""
        return _quantile(_sizes(self._block_with_repeats)), _quantile(_sizes(self._blocks_of_new()))

    def p_value(self, risk: Risk, losses: Tensor, tolerance: float, delta: float) -> float:
        """Return a p-value of the hypothesis that the expected loss of requests, or of new contents, is above T.

        Args:
            risk: what the losses measure.
            losses: (N,) losses of the records.
            tolerance: T.
            delta: the level with which the p-value will be compared; it tunes the bets and nothing else.
        """
        of_new, blocks_of_new = self._of_new(losses.double())
        grouped, (requests, contents) = self._block_with_repeats, self.expected or (None, None)
        of_requests = [_p_value(risk, losses.double(), block, tolerance, delta, self.largest[0], requests)
                       for block in ((self.block,) if torch.equal(grouped, self.block) else (self.block, grouped))]
        return max(*of_requests, _p_value(risk, of_new, blocks_of_new, tolerance, delta, self.largest[1], contents))

    def require_enough(self, risk: Risk, tolerance: float, delta: float, share: float, others: str = "") -> None:
        """Check that the records can certify anything.

        Args:
            risk: what the losses measure.
            tolerance: T.
            delta: 1 - confidence.
            share: the certify part as a fraction of all records.
            others: the end of the message, with a sentence about records that are ignored.

        Raises:
            TooFewRecordsError: even if no answer differs, nothing can be certified. The message says what is missing.
        """
        if self.p_value(risk, torch.zeros(len(self.block)), tolerance, delta) <= delta:
            return
        of_requests = _sizes(self._block_with_repeats), self.largest[0], "blocks of similar requests"
        of_contents = _sizes(self._blocks_of_new()), self.largest[1], "new scenes or contents"
        missing = [(blocks_needed(risk, sizes, largest, tolerance, delta), len(sizes), what)
                   for sizes, largest, what in (of_contents, of_requests)]
        least, n, what = max(missing, key=lambda one: one[0] / max(1, one[1]))
        least = max(least, n + 1)  # n are too few: the bets were tuned to the expected number, not to n
        n_records = len(self.block)
        found = f"{n_records} records" if n == n_records else f"{n_records} records of {n} {what}"
        n_needed = math.ceil(1.2 * least * (n_records / n if n else 1) / share)
        raise TooFewRecordsError(
            f"{found} to certify with, but {tolerance:.2%} at {1 - delta:.0%} confidence needs at least {least} "
            f"even if no answer differs: collect about {n_needed} records in all (twice that to tolerate "
            f"differences), or ask for a larger --tolerance. No plan was written{others}", n_needed)

    @cached_property
    def _block_with_repeats(self) -> Tensor:
        """Return the (N,) block of each record. Repeats of a new content are in the block in which the content was new.

        A content that is popular for a while is one piece of evidence, as a scene is.
        """
        content, index = torch.unique(self.content, return_inverse=True)
        first = torch.full((len(content),), -1, dtype=torch.int64)
        first[index[self.is_new]] = self.block[self.is_new]
        return torch.where(first[index] < 0, self.block, first[index])

    def _blocks_of_new(self) -> Tensor:
        """Return the (M,) block of each new content."""
        return self._of_new(torch.zeros(len(self.block)))[1]

    def _of_new(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (M,) losses of the new contents, and their (M,) blocks.

        If a content has several records, the largest of their losses is used, whatever their order.
        """
        content, index = torch.unique(self.content[self.is_new], return_inverse=True)
        lowest = torch.full((len(content),), -torch.inf, dtype=losses.dtype)
        worst = lowest.scatter_reduce(0, index, losses[self.is_new], "amax")
        block = torch.zeros(len(content), dtype=torch.int64).scatter(0, index, self.block[self.is_new])
        return worst, block


def _p_value(risk: Risk, losses: Tensor, block: Tensor, tolerance: float, delta: float, largest: float,
             expected: float | None = None) -> float:
    _, index, n = torch.unique(block, return_inverse=True, return_counts=True)
    if not len(n):
        return 1.0
    if int(n.max()) == 1:
        return risk_p_value(risk, losses, tolerance, delta)
    span = 1 - risk.lowest
    share = (tolerance - risk.lowest) / span
    lost = torch.zeros(len(n), dtype=torch.float64).scatter_add(0, index, (losses - risk.lowest) / span)
    if lost.sum() > share * n.sum():  # large blocks count less in the bets below, which must not hide their losses
        return 1.0
    counts = (largest / n.double()).clamp_max(1.0) / largest
    gains = (share * n - lost) * counts  # T n_b - k_b, in parts of the largest block that counts fully
    return betting_p_value((share - gains).numpy(), share, delta, expected)


def blocks_needed(risk: Risk, sizes: Tensor, largest: float, tolerance: float, delta: float) -> int:
    """Return the smallest number of blocks that can certify a tolerance, if no answer differs.

    Args:
        risk: what the losses measure.
        sizes: (B,) int64: numbers of records. The blocks have these sizes in turn; if B is 0, each has one record.
        largest: the number of records up to which a block counts fully.
        tolerance: T.
        delta: 1 - confidence.

    >>> blocks_needed(Risk.DISAGREEMENT, torch.tensor([1]), 1.0, 0.02, 0.05)
    149
    >>> blocks_needed(Risk.DISAGREEMENT, torch.tensor([5]), 5.0, 0.02, 0.05)
    159
    """
    sizes = sizes if len(sizes) else torch.ones(1, dtype=torch.int64)

    def certify(n: int) -> bool:
        block = torch.arange(n).repeat_interleave(sizes.repeat(-(-n // len(sizes)))[:n])
        no_loss = torch.zeros(len(block), dtype=torch.float64)
        return _p_value(risk, no_loss, block, tolerance, delta, largest) <= delta

    too_few, enough = 0, 1
    while not certify(enough):
        too_few, enough = enough, 2 * enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if certify(middle) else (middle, enough)
    return enough


def _sizes(block: Tensor) -> Tensor:
    """Return the (B,) numbers of records in each block of N."""
    sizes: Tensor = torch.unique(block, return_counts=True)[1]
    return sizes


def _quantile(sizes: Tensor) -> float:
    return float(torch.quantile(sizes.double(), COUNTS_FULLY)) if len(sizes) else 1.0
