"""Splits records, by time or at random, into three parts: for training heads, choosing exits and certifying plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from early_exit.handler.exits.likeness import Likeness
from early_exit.training.selection.blocks import blocks_of
from early_exit.training.selection.evidence import Evidence
from early_exit.training.selection.likeness import has_trend, likeness

GAP = -1
"""Marks records that belong to no part: they lie between two parts, or may repeat a record of a later part."""
REPEATED = -2
"""Marks records of the tune part whose content an earlier request had. They are used only to fix how large blocks are,
and how many are expected."""


class Part(Enum):
    """The disjoint parts of the records. The value of each is the fraction in [0, 1) of the records at which it begins.

    The parts are named after their use. "Calibration" would be ambiguous: temperatures are calibrated on one part, and
    the risk on another.
    """

    TRAIN = 0.0
    """The part on which heads are trained."""
    TUNE = 0.5
    """The validation split, on which architectures, temperatures, exits and thresholds are chosen."""
    CERTIFY = 0.7
    """The part that is held out for the certificate and for the figures that are reported."""

    @property
    def share(self) -> float:
        """The fraction of the records in the part, as in section 3.2.2 of the paper."""
        ends = [*(part.value for part in Part), 1.0]
        return float(ends[ends.index(self.value) + 1] - self.value)

    @property
    def number(self) -> int:
        """The number of the part in tensors."""
        return list(Part).index(self)


class SplitRule(str, Enum):
    """How records are split."""

    TIME = "time"
    """Train on the oldest records, choose on later ones, and certify on the newest."""
    RANDOM = "random"
    """Split by a hash of the request, as in the paper. This assumes that no record is like another one: near-copies of
    training records, such as frames or retries, would be in all parts."""


@dataclass(frozen=True)
class Split:
    """The parts of N records, and the blocks that count as one piece of evidence each."""

    part: Tensor
    """(N,) int8: number of each record's part, or `GAP` or `REPEATED`."""
    block: Tensor
    """(N,) int64: number of the block that each record is in; see `selection.blocks`."""
    content: Tensor
    """(N,) int64: equal for records with the same content. In a random split, all numbers differ, because it does not
    compare contents."""
    is_new: Tensor
    """(N,) bool: whether the record's block is the one in which its content was first recorded."""
    likeness: Likeness | None = None
    """The likeness by which blocks were formed; None if each record is a block of its own."""
    is_trend: bool = False
    """Whether requests stay alike for longer than a tenth of the records."""

    @classmethod
    def of_nothing(cls, n: int) -> Split:
        """Return the split of N records that are all in the train part, each as a block of its own."""
        return cls(torch.zeros(n, dtype=torch.int8), torch.arange(n), torch.arange(n), torch.ones(n, dtype=torch.bool))

    def where(self, chosen: Tensor) -> Split:
        """Return the split of the records that a (N,) bool mask chooses."""
        return replace(self, part=self.part[chosen], block=self.block[chosen], content=self.content[chosen],
                       is_new=self.is_new[chosen])

    def rows(self, part: Part) -> Tensor:
        """Return the (M,) positions of a part's records."""
        return (self.part == part.number).nonzero().flatten()

    def evidence(self, counts: Tensor | None = None) -> Evidence:
        """Return the evidence of the certify part. The size up to which its blocks count fully, and the expected number
        of its blocks, are fixed on the tune part.

        Args:
            counts: (N,) bool: the records that are used; by default all.
        """
        counts = torch.ones(len(self.part), dtype=torch.bool) if counts is None else counts

        def of(records: Tensor) -> Evidence:
            rows = (records & counts).nonzero().flatten()
            return Evidence(self.block[rows], self.content[rows], self.is_new[rows])

        before = of((self.part == Part.TUNE.number) | (self.part == REPEATED))
        return of(self.part == Part.CERTIFY.number).after(before)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return tensors that `from_tensors` reads."""
        return {"part": self.part, "block": self.block, "content": self.content, "is_new": self.is_new,
                "is_trend": torch.tensor(self.is_trend), **(self.likeness.to_tensors() if self.likeness else {})}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Split:
        """Read the output of `to_tensors`."""
        return cls(tensors["part"], tensors["block"], tensors["content"], tensors["is_new"],
                   Likeness.from_tensors(tensors), bool(tensors["is_trend"]))


def split_at_random(request: Tensor, trains: Tensor) -> Split:
    """Split by the hashes of requests.

    Args:
        request: (N,) int64 hashes.
        trains: (N,) bool: records that are in the train part whatever their hash, because they must not be evidence.
    """
    starts = torch.tensor([part.value for part in Part], dtype=torch.float64)
    part = (torch.searchsorted(starts, request.double() / 2.0**64 + 0.5, right=True) - 1).to(torch.int8)
    return replace(Split.of_nothing(len(request)), part=part.masked_fill(trains, Part.TRAIN.number))


def split_in_time(states: Tensor, request: Tensor, content: Tensor, order: Tensor, position: Tensor,
                  is_evidence: Tensor, is_fresh: Tensor, is_drawn: Tensor) -> Split:
    """Split by time. If records come in blocks, the block at the border of two parts is in neither.

    Args:
        states: (N, K) log-probabilities of the backbone.
        request: (N,) int64 hashes; all records of a request are in the part and block of its first record.
        content: (N,) int64 hashes of the contents of the requests.
        order: (N,) int64: the records in the order in which they came.
        position: (N,) float64: how many requests were served before each.
        is_evidence: (N,) bool: the records that can be evidence. The others are in the train part if they came before
            the tune part. Later ones are in no part, because they may be copies of records on which exits are chosen or
            certified.
        is_fresh: (N,) bool: the records that are newer than the last certificate; older ones are in the train part.
        is_drawn: (N,) bool: the records that are drawn at one rate, see `data.sampling`. The others are no evidence,
            but their contents are known.
    """
    known = order[is_evidence[order]]
    evidence = known[is_drawn[known]]
    _, first, index = np.unique(request[evidence].numpy(), return_index=True, return_inverse=True)
    proving = evidence[torch.from_numpy(np.sort(first))]
    fresh = proving[is_fresh[proving]]
    n = len(order)
    part = torch.full((n,), Part.TRAIN.number, dtype=torch.int8)
    block = torch.full((n,), GAP, dtype=torch.int64)
    begin_tune, begin_certify = int(Part.TUNE.value * len(fresh)), int(Part.CERTIFY.value * len(fresh))
    early = proving[:len(proving) - (len(fresh) - begin_certify)]
    alike, is_trend = _likeness(states[early], position[early], content[early], begin_certify)
    later = fresh[begin_tune:]
    if len(later):
        place = torch.empty(n, dtype=torch.int64)
        place[order] = torch.arange(n)
        part[~(is_evidence & is_drawn) & (place >= place[later[0]])] = GAP
    block[later] = blocks = blocks_of(alike, states[later], position[later], content[later])
    n_tune = begin_certify - begin_tune
    part[later[:n_tune]], part[later[n_tune:]] = Part.TUNE.number, Part.CERTIFY.number
    if alike.length and len(later):  # a block at the border may share its scene with the part before
        part[later[(blocks == blocks[0]) | (blocks == blocks[min(n_tune, len(later) - 1)])]] = GAP
    if alike.is_periodic:  # the end of a scene may be in the next period
        part[later[n_tune:][blocks[n_tune:] % 2 == 0]] = GAP
    of_first = evidence[torch.from_numpy(first[index])]
    part[evidence], block[evidence] = part[of_first], block[of_first]
    is_new, is_first = _new(content, request, block, known)
    repeats = (part == Part.TUNE.number) & ~is_first
    return Split(part.masked_fill(repeats, REPEATED), block, content, is_new, alike if alike.length else None, is_trend)


def _likeness(states: Tensor, position: Tensor, content: Tensor, n_fresh: int) -> tuple[Likeness, bool]:
    """Return the likeness of the records before the certify part, and whether these records have a trend.

    Records from before the last certificate may be of other traffic, and may be so many that the likeness of the fresh
    records does not show. The likeness is therefore determined twice: on all records, and on the fresh ones alone. The
    one that leaves less evidence is returned.

    Args:
        states: (N, K) log-probabilities of the backbone, in time order.
        position: (N,) float64: how many requests were served before each.
        content: (N,) int64 hashes of the contents.
        n_fresh: the number of records, at the end, that are newer than the last certificate.
    """
    n = len(states)
    asked = [slice(first, n) for first in dict.fromkeys((0, n - n_fresh))]
    fresh = states[n - n_fresh:], position[n - n_fresh:], content[n - n_fresh:]

    def n_pieces(alike: Likeness) -> float:
        n_blocks = int(blocks_of(alike, *fresh)[-1]) + 1 if n_fresh else 0
        return n_blocks / 2 if alike.is_periodic else n_blocks

    alike = min((likeness(states[rows], position[rows], content[rows]) for rows in asked), key=n_pieces)
    return alike, any(has_trend(alike, states[rows], position[rows], content[rows]) for rows in asked)


def _new(content: Tensor, request: Tensor, block: Tensor, proving: Tensor) -> tuple[Tensor, Tensor]:
    """Return two (N,) bool masks: the records whose content first occurred in their block, and the records of the first
    request with their content.

    Args:
        content: (N,) hashes of contents.
        request: (N,) hashes of requests.
        block: (N,) numbers of blocks.
        proving: (M,) the records that are compared, in their order.
    """
    _, first, index = np.unique(content[proving].numpy(), return_index=True, return_inverse=True)
    firsts = proving[torch.from_numpy(first[index])]
    is_first = torch.zeros(len(content), dtype=torch.bool)
    is_first[proving] = request[proving] == request[firsts]
    is_new = torch.zeros(len(content), dtype=torch.bool)
    of_first = block[firsts]
    is_new[proving] = (block[proving] == of_first) & (of_first != GAP)
    return is_new, is_first


def in_time_order(time: Tensor, worker: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order in which N records came, and an estimate of the number of requests that came before each.

    Args:
        time: (N,) float64 Unix seconds, corrected if a clock was set in the meantime.
        worker: (N,) int64 number of the worker that recorded each.
        sequence: (N,) int64 number of requests that the worker had answered before.

    Returns:
        The (N,) int64 positions of the records in time order, and the (N,) float64 numbers of requests.
    """
    by_worker = torch.from_numpy(np.lexsort((sequence.numpy(), worker.numpy())))
    steps = torch.ones(len(time), dtype=torch.float64)
    if len(time) > 1:
        of_one = worker[by_worker][1:] == worker[by_worker][:-1]
        between = (sequence[by_worker][1:] - sequence[by_worker][:-1]).double()
        steps[by_worker[1:]] = torch.where(of_one, between, 1.0)
    order = torch.from_numpy(np.lexsort((sequence.numpy(), worker.numpy(), time.numpy())))
    position = torch.empty(len(time), dtype=torch.float64)
    position[order] = steps[order].cumsum(dim=0) - 1
    return order, position
