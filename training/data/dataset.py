"""The records of one backbone, read shard by shard and split by request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.errors import RecordError
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.format import ANONYMOUS, COLUMNS, RecordColumns, Records, read_header, read_shard
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.training.data.shards import times_of

_SPREAD = -7046029254386353131
"""2^64 by the golden ratio, for Fibonacci hashing."""


NOT_FINITE = "the model's scores or activations were not finite"
"""Why a request is not among the records."""


class Part(Enum):
    """The disjoint parts of the records; the values are where each begins in [0, 1).

    They are named by what is done on them: calibration would mean two things, as temperatures are calibrated on one
    part and the risk on another.
    """

    TRAIN = 0.0
    """Heads are trained on it."""
    TUNE = 0.5
    """It is the validation split: architectures, temperatures, exits and thresholds are chosen on it."""
    CERTIFY = 0.7
    """It is held out for the certificate; what a plan does is reported on it."""

    @property
    def share(self) -> float:
        """Fraction of the records, as in section 3.2.2 of the paper."""
        ends = [*(part.value for part in Part), 1.0]
        return float(ends[ends.index(self.value) + 1] - self.value)


@dataclass(frozen=True, kw_only=True)
class RecordedTraffic(RecordColumns):
    """N records without their activations, which are read layer by layer.

    Each instance of a known request is in it once, and outside of the train part there is one record of a request:
    records of one request are alike, and a certificate counts independent ones. Which one is drawn by a hash.
    """

    shards: tuple[Path, ...]
    sizes: tuple[int, ...]
    """The number of records in each shard."""
    rows: Tensor
    """(N,) int64, ascending: positions of the records used in the concatenated shards."""
    fresh_after: float = -math.inf
    """All records up to this Unix time, in seconds, are of the train part."""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """The number of other requests of these shards that are not among the records, by reason."""

    @property
    def part(self) -> Tensor:
        """(N,) int8: index of each record's part, which the hash of its request decides, and its time.

        Where the request or its content is not known it is the train part: what is chosen and certified rests on
        independent records.
        """
        position = self.request.double() / 2.0**64 + 0.5  # in [0, 1]
        starts = torch.tensor([part.value for part in Part], dtype=torch.float64)
        part = (torch.searchsorted(starts, position, right=True) - 1).to(torch.int8)
        trains = ~self.is_evidence | (self.time <= self.fresh_after)
        return part.masked_fill(trains, list(Part).index(Part.TRAIN))

    @property
    def is_evidence(self) -> Tensor:
        """(N,) bool: whether it is known which request each record is of, and which content that has: what may be a
        repeat proves nothing."""
        return (self.request != ANONYMOUS) & (self.content != UNKNOWN_CONTENT)

    @property
    def n_anonymous(self) -> int:
        """The number of records of which the request is not known."""
        return int((self.request == ANONYMOUS).sum())

    @property
    def n_without_content(self) -> int:
        """The number of records of which the request is known, but not its content."""
        return int((~self.is_evidence).sum()) - self.n_anonymous

    def where(self, chosen: Tensor) -> RecordedTraffic:
        """Return the records that a (N,) bool mask chooses."""
        columns = {name: getattr(self, name)[chosen] for name in COLUMNS}
        return replace(self, rows=self.rows[chosen], **columns)

    def of_known_requests(self) -> RecordedTraffic:
        """Return the records of which it is known which request they belong to.

        Raises:
            RecordError: there are none.
        """
        known = self.request != ANONYMOUS
        if not bool(known.any()):
            raise RecordError("the records hold no requests: the handler's rows could not be assigned to its "
                              "requests while it served, and the log of its workers says why")
        return self.where(known)

    def size(self, part: Part) -> int:
        """Return the number of a part's records."""
        return int((self.part == list(Part).index(part)).sum())

    def activation(self, layer: str) -> Iterator[tuple[int, Tensor]]:
        """Yield the (M, ...) float16 pooled activations of a layer, shard by shard, and where in N they begin.

        Raises:
            RecordError: a shard is damaged or has gone.
        """
        for start, inside, shard in self._by_shard():
            yield start, read_shard(shard, [layer]).activations[layer][inside]

    def kept(self) -> Iterator[tuple[int, list[KeptRequest | None]]]:
        """Yield what the handler got, shard by shard, and where in N it begins; None where that was not kept.

        Raises:
            RecordError: a shard is damaged or has gone.
        """
        for start, inside, shard in self._by_shard():
            kept = read_shard(shard, [], kept=True).kept
            try:
                yield start, [KeptRequest.from_bytes(kept[row]) if kept and kept[row] else None
                              for row in inside.tolist()]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise RecordError(f"cannot read the requests in {shard}: {type(error).__name__}: {error}") from error

    def _by_shard(self) -> Iterator[tuple[int, Tensor, Path]]:
        start = 0
        for end, size, shard in zip(accumulate(self.sizes), self.sizes, self.shards):
            inside = self.rows[(self.rows >= end - size) & (self.rows < end)] - (end - size)
            yield start, inside, shard
            start += len(inside)


def load_traffic(shards: Sequence[Path], fresh_after: float | None = None) -> RecordedTraffic:
    """Read everything but the activations.

    Args:
        shards: of one backbone.
        fresh_after: Unix time up to which all records are of the train part.

    Raises:
        RecordError: a shard is damaged or has gone.
    """
    parts = [read_shard(shard, []) for shard in shards]
    records, times = Records.concatenate(parts), times_of(shards)
    records = replace(records, time=torch.cat([times[shard] for shard in shards]))
    rows = _first_of_each(records.request, records.row)
    columns = {name: column[rows] if column.is_floating_point() else column[rows].long()
               for name, column in records.columns().items()}
    traffic = RecordedTraffic(shards=tuple(shards), sizes=tuple(map(len, parts)), rows=rows, passed_over={},
                              fresh_after=-math.inf if fresh_after is None else fresh_after, **columns)
    no_number = traffic.log_probabilities.isnan().any(dim=1)
    if n_not_finite := int(no_number.sum()) + sum(read_header(shard).n_not_finite for shard in shards):
        traffic = replace(traffic.where(~no_number), passed_over={NOT_FINITE: n_not_finite})
    trains = traffic.part == list(Part).index(Part.TRAIN)
    return traffic.where(trains | _drawn_of_each(traffic.request, traffic.row))


def _first_of_each(request: Tensor, row: Tensor) -> Tensor:
    """Return the positions of the first record of each row of a request, as TorchServe may run one twice, and all
    others of unknown requests."""
    order = torch.argsort(row, stable=True)
    order = order[torch.argsort(request[order], stable=True)]
    same = _as_before(request[order]) & _as_before(row[order]) & (request[order] != ANONYMOUS)
    return order[~same].sort().values


def _drawn_of_each(request: Tensor, row: Tensor) -> Tensor:
    """Return a (N,) bool mask of one record of each request; each of its rows is as likely to be the one."""
    drawn = (request ^ (row + 1) * _SPREAD) * _SPREAD  # request is a hash: this is another for each row
    order = torch.argsort(drawn)
    order = order[torch.argsort(request[order], stable=True)]
    return torch.zeros(len(request), dtype=torch.bool).scatter(0, order, ~_as_before(request[order]))


def _as_before(ordered: Tensor) -> Tensor:
    """Return a (N,) bool mask of the values that are those before them."""
    same = torch.zeros(len(ordered), dtype=torch.bool)
    same[1:] = ordered[1:] == ordered[:-1]
    return same
