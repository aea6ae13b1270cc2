"""The records of one backbone, read shard by shard and split by request."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.errors import RecordError
from early_exit.handler.recording.content import UNKNOWN_CONTENT
from early_exit.handler.recording.format import (
    ANONYMOUS,
    COLUMNS,
    RecordColumns,
    Records,
    ShardHeader,
    read_header,
    read_shard,
)
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.training.data.sampling import SPREAD, chance_at_one_rate, common_end, drawn, dropped_share
from early_exit.training.data.shards import times_of
from early_exit.training.data.split import GAP, Part, Split, SplitRule, in_time_order, split_at_random, split_in_time

NOT_FINITE = "the model's scores were not finite and predicted no class"
MAY_REPEAT = ("their requests or contents are not known, so they may repeat those by which exits are chosen and "
              "certified")
DRAWN_MORE_OFTEN = "at their time, another worker recorded a smaller share of its requests"
NEWER_THAN_OTHERS = "they are newer than the newest records of another host, which may have served since"
NOT_WRITTEN = "the workers could not write them in time, or could not make records of them"
"""The reasons for which a request is not among the records."""


@dataclass(frozen=True, kw_only=True)
class RecordedTraffic(RecordColumns):
    """N records without their activations, which are read layer by layer.

    Each instance of a known request occurs once. Outside the train part, each request has one record, which is drawn by
    a hash: records of one request are alike, and a certificate counts independent records.
    """

    shards: tuple[Path, ...]
    sizes: tuple[int, ...]
    """The number of records in each shard."""
    rows: Tensor
    """(N,) int64, ascending: positions, in the concatenated shards, of the records in use."""
    split: Split
    """The parts of the records."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """The number of requests of these shards that are not among the records, by reason."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """The hosts whose records end before those of others, and how many of their requests are in the certify part. The
    host whose records end last comes first."""
    dropped: float = 0.0
    """The share of records that workers dropped, among all drawn records of the time of the certify part."""

    @property
    def part(self) -> Tensor:
        """(N,) int8: number of each record's part.

        A record whose request or content is not known is in the train part or in no part, because exits are chosen and
        certified on independent records.
        """
        return self.split.part

    @property
    def is_evidence(self) -> Tensor:
        """(N,) bool: whether both the request and the content of each record are known. A record that may be a repeat
        proves nothing."""
        return (self.request != ANONYMOUS) & (self.content != UNKNOWN_CONTENT)

    @property
    def n_anonymous(self) -> int:
        """The number of records whose request is not known."""
        return int((self.request == ANONYMOUS).sum())

    @property
    def n_without_content(self) -> int:
        """The number of records whose request is known, but not its content."""
        return int((~self.is_evidence).sum()) - self.n_anonymous

    def where(self, chosen: Tensor) -> RecordedTraffic:
        """Return the records that a (N,) bool mask chooses."""
        columns = {name: getattr(self, name)[chosen] for name in COLUMNS}
        return replace(self, rows=self.rows[chosen], split=self.split.where(chosen), **columns)

    def of_known_requests(self) -> RecordedTraffic:
        """Return the records whose request is known.

        Raises:
            RecordError: there are no such records.
        """
        known = self.request != ANONYMOUS
        if not bool(known.any()):
            raise RecordError("the records hold no requests: the handler's rows could not be assigned to its "
                              "requests while it served, and the log of its workers says why")
        return self.where(known)

    def size(self, part: Part) -> int:
        """Return the number of a part's records."""
        return len(self.split.rows(part))

    def activation(self, layer: str) -> Iterator[tuple[int, Tensor]]:
        """Yield for each shard the position of its first record among the N, and the activations of a layer.

        The activations are pooled: (M, ...) float16 for the M records of the shard.

        Raises:
            RecordError: a shard is damaged or has gone.
        """
        for start, inside, shard in self._by_shard():
            yield start, read_shard(shard, [layer]).activations[layer][inside]

    def kept(self) -> Iterator[tuple[int, list[KeptRequest | None]]]:
        """Yield for each shard the position of its first record among the N, and its requests.

        A request that was not kept is None.

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


def load_traffic(shards: Sequence[Path], fresh_after: float | None = None,
                 rule: SplitRule = SplitRule.TIME) -> RecordedTraffic:
    """Read everything except the activations.

    Args:
        shards: shards of one backbone.
        fresh_after: Unix time up to which all records belong to the train part.
        rule: how the other records are split.

    Raises:
        RecordError: a shard is damaged or has gone.
    """
    parts, headers = [read_shard(shard, []) for shard in shards], [read_header(shard) for shard in shards]
    records, times = Records.concatenate(parts), times_of(shards)
    records = replace(records, time=torch.cat([times[shard] for shard in shards]))
    worker = _numbers([header.worker for header in headers], parts)
    hosts = _hosts(shards, headers)
    host = _numbers(hosts, parts)
    usable = records.predict()
    rows = _first_of_each(records.request, records.row)
    rows = rows[usable[rows]]
    columns = {name: column[rows] if column.is_floating_point() else column[rows].long()
               for name, column in records.columns().items()}
    traffic = RecordedTraffic(shards=tuple(shards), sizes=tuple(map(len, parts)), rows=rows, skipped={}, ended={},
                              dropped=0.0, split=Split.of_nothing(len(rows)), **columns)
    chance = chance_at_one_rate(traffic.time, worker[rows], traffic.sampling_rate)
    is_drawn = drawn(traffic.request, chance)
    is_fresh = traffic.time > (-math.inf if fresh_after is None else fresh_after)
    proves, host = traffic.is_evidence & is_drawn, host[rows]
    end, ended = common_end(traffic.time[proves], host[proves], traffic.request[proves], is_fresh[proves],
                            Part.CERTIFY.share)
    is_newer, names = traffic.time > end, [*dict.fromkeys(hosts)]
    traffic = replace(traffic, split=_split(traffic, worker[rows], is_fresh, rule, is_drawn & ~is_newer))
    is_left_out = traffic.part == GAP
    skipped = {NOT_FINITE: int((~usable).sum()) + sum(header.n_not_finite for header in headers),
               NOT_WRITTEN: sum(header.n_dropped for header in headers),
               MAY_REPEAT: int((~traffic.is_evidence & is_left_out).sum()),
               NEWER_THAN_OTHERS: int((traffic.is_evidence & is_newer & is_left_out).sum()),
               DRAWN_MORE_OFTEN: int((traffic.is_evidence & ~is_newer & ~is_drawn & is_left_out).sum())}
    is_used = (traffic.part == Part.TRAIN.number) | (
        (traffic.part != GAP) & _drawn_of_each(traffic.request, traffic.row))
    certifies = traffic.part == Part.CERTIFY.number
    traffic = replace(
        traffic, skipped={reason: count for reason, count in skipped.items() if count},
        ended={names[number]: int((certifies & is_used & (host == number)).sum()) for number in ended},
        dropped=dropped_share(headers, [part.time for part in parts], [times[shard] for shard in shards],
                              _by_shard(chance, rows, parts), traffic.time[is_drawn], traffic.time[certifies]))
    return traffic.where(is_used)


def _hosts(shards: Sequence[Path], headers: Sequence[ShardHeader]) -> list[str]:
    """Return the name of the host of each shard. Shards of earlier versions name none: they are taken to be of the only
    host that others in their folder name, or else of a host with the name of the folder."""
    named: dict[Path, set[str]] = defaultdict(set)
    for shard, header in zip(shards, headers):
        if header.host:
            named[shard.parent].add(header.host)
    return [header.host or (min(named[shard.parent]) if len(named[shard.parent]) == 1 else str(shard.parent))
            for shard, header in zip(shards, headers)]


def _by_shard(values: Tensor, rows: Tensor, parts: Sequence[Records]) -> list[Tensor]:
    """Return those of the (N,) values that belong to each shard.

    Args:
        values: (N,) values of the records in use.
        rows: (N,) int64, ascending: positions of these records in the concatenated shards.
        parts: the records of each shard.
    """
    ends = torch.tensor([0, *accumulate(map(len, parts))])
    return list(torch.tensor_split(values, torch.searchsorted(rows, ends[1:-1])))


def _numbers(names: Sequence[Hashable], parts: Sequence[Records]) -> Tensor:
    """Return (N,) int64: for each of the N records of all parts, the number of the name of its part."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.cat([torch.full((len(part),), numbers[name]) for name, part in zip(names, parts)])


def _split(traffic: RecordedTraffic, worker: Tensor, is_fresh: Tensor, rule: SplitRule, is_drawn: Tensor) -> Split:
    if rule is SplitRule.RANDOM:
        return split_at_random(traffic.request, ~(traffic.is_evidence & is_drawn & is_fresh))
    order, position = in_time_order(traffic.time, worker, traffic.sequence)
    return split_in_time(traffic.log_probabilities, traffic.request, traffic.content, order, position,
                         traffic.is_evidence, is_fresh, is_drawn)


def _first_of_each(request: Tensor, row: Tensor) -> Tensor:
    """Return the positions of the first record of each row of a request, and of all records of unknown requests.

    TorchServe may run a request twice.
    """
    order = torch.argsort(row, stable=True)
    order = order[torch.argsort(request[order], stable=True)]
    same = _as_before(request[order]) & _as_before(row[order]) & (request[order] != ANONYMOUS)
    return order[~same].sort().values


def _drawn_of_each(request: Tensor, row: Tensor) -> Tensor:
    """Return a (N,) bool mask that draws one record of each request; all rows of a request are equally likely."""
    drawn = (request ^ (row + 1) * SPREAD) * SPREAD  # request is a hash; this is a different hash for each row
    order = torch.argsort(drawn)
    order = order[torch.argsort(request[order], stable=True)]
    return torch.zeros(len(request), dtype=torch.bool).scatter(0, order, ~_as_before(request[order]))


def _as_before(ordered: Tensor) -> Tensor:
    """Return a (N,) bool mask of the values that equal the value before them."""
    same = torch.zeros(len(ordered), dtype=torch.bool)
    same[1:] = ordered[1:] == ordered[:-1]
    return same
