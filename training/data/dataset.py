"""The records of one backbone, read shard by shard and split by request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.backbone.pooling import Side
from early_exit.handler.engines.registry import are_alike
from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import (
    ANONYMOUS,
    COLUMNS,
    RecordColumns,
    Records,
    list_shards,
    read_header,
    read_shard,
    read_times,
)
from early_exit.handler.recording.kept_request import KeptRequest

_SPREAD = -7046029254386353131
"""2^64 by the golden ratio, for Fibonacci hashing."""


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

    @property
    def part(self) -> Tensor:
        """(N,) int8: index of each record's part, which the hash of its request decides, and its time.

        Where the request is not known it is the train part: what is chosen and certified rests on independent records.
        """
        position = self.request.double() / 2.0**64 + 0.5  # in [0, 1]
        starts = torch.tensor([part.value for part in Part], dtype=torch.float64)
        part = (torch.searchsorted(starts, position, right=True) - 1).to(torch.int8)
        trains = (self.request == ANONYMOUS) | (self.time <= self.fresh_after)
        return part.masked_fill(trains, list(Part).index(Part.TRAIN))

    @property
    def n_anonymous(self) -> int:
        """The number of records of which the request is not known."""
        return int((self.request == ANONYMOUS).sum())

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
        """Yield what the handler got, shard by shard, and where in N it begins; None where that could not be kept.

        Raises:
            RecordError: a shard is damaged or has gone, or holds no requests.
        """
        for start, inside, shard in self._by_shard():
            kept = read_shard(shard, [], kept=True).kept
            if kept is None:
                raise RecordError(f"{shard} holds no requests, which a replay needs: record with "
                                  "'early_exit: {keep_requests: true}' in model-config.yaml")
            try:
                yield start, [KeptRequest.from_bytes(kept[row]) if kept[row] else None for row in inside.tolist()]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise RecordError(f"cannot read the requests in {shard}: {type(error).__name__}: {error}") from error

    def _by_shard(self) -> Iterator[tuple[int, Tensor, Path]]:
        start = 0
        for end, size, shard in zip(accumulate(self.sizes), self.sizes, self.shards):
            inside = self.rows[(self.rows >= end - size) & (self.rows < end)] - (end - size)
            yield start, inside, shard
            start += len(inside)


def find_shards(records: Path | Sequence[Path], model: str, backbone: BackboneDescription) -> list[Path]:
    """Return the shards of one backbone below some records folders, oldest first.

    Raises:
        RecordError: there are none; the message tells what there is.
    """
    folders = [records] if isinstance(records, Path) else records
    for folder in folders:
        if not folder.is_dir():
            raise RecordError(f"no records folder at {folder}: pass the one that ee-serve printed")
    shards = [shard for folder in folders for shard in list_shards(folder)]
    matching = [shard for shard in shards if shard.parent.name == backbone.sha256]
    if matching:
        return matching
    others = sorted({f"{shard.parent.parent.name} {shard.parent.name[:12]}" for shard in shards})
    where = ", ".join(map(str, folders))
    raise RecordError(f"{where} has no records of {model} with the backbone {backbone.sha256[:12]}; it has "
                      f"{', '.join(others) or 'none at all'}. Serve the archive, send requests, and wait until the "
                      "first shard is sealed")


def readable_shards(shards: Sequence[Path], log: Callable[[str], None]) -> list[Path]:
    """Return the shards that can be read; of each other one, such as one that was cut short, a line is logged.

    Raises:
        RecordError: there are none.
        FormatError: a shard has a format that this version does not read.
    """
    readable = []
    for shard in shards:
        try:
            read_header(shard)
            read_times(shard)
        except RecordError as error:
            log(f"{error}. It is passed over")
        else:
            readable.append(shard)
    if not readable:
        raise RecordError(f"none of the {len(shards)} record shards can be read: record again")
    return readable


def recorded_layers(shards: Sequence[Path]) -> tuple[set[str], Side]:
    """Return the paths of the layers that every shard of one setting holds, and the side to which they were pooled."""
    headers = [read_header(shard) for shard in shards]
    return set.intersection(*(set(header.layers) for header in headers)), headers[0].pool


def of_newest_setting(shards: Sequence[Path]) -> list[Path]:
    """Return the shards that can be used together with the newest: pooled alike, and with layers in common.

    Shards that hold layers besides the common ones stay: what is recorded depends on the plan that serves.
    """
    headers = {shard: read_header(shard) for shard in shards}
    newest_first = sorted(shards, key=lambda shard: read_times(shard).max().item(), reverse=True)
    newest = headers[newest_first[0]]
    common, usable = set(newest.layers), set[Path]()
    for shard in newest_first:
        if headers[shard].pool == newest.pool and common & set(headers[shard].layers):
            common &= set(headers[shard].layers)
            usable.add(shard)
    return [shard for shard in shards if shard in usable]


def of_engine(shards: Sequence[Path], engine: str) -> list[Path]:
    """Return the shards whose activations are those that heads will read.

    Args:
        shards: of one backbone.
        engine: identity of the one that will serve.

    Raises:
        RecordError: other engines computed all of them.
    """
    made_on = {shard: read_header(shard).engine for shard in shards}
    alike = [shard for shard in shards if are_alike(made_on[shard], engine)]
    if not alike:
        others = ", ".join(sorted(set(made_on.values())))
        raise RecordError(f"the archive is executed by {engine}, but {others} made the records, and heads would read "
                          "other activations: record with this archive, or run the recorded requests again with "
                          "--replay, for which they must have been recorded with 'keep_requests: true'")
    return alike


def load_traffic(shards: Sequence[Path], fresh_after: float | None = None) -> RecordedTraffic:
    """Read everything but the activations.

    Args:
        shards: of one backbone.
        fresh_after: Unix time up to which all records are of the train part.

    Raises:
        RecordError: a shard is damaged or has gone.
    """
    parts = [read_shard(shard, []) for shard in shards]
    records = Records.concatenate(parts)
    rows = _first_of_each(records.request, records.row)
    columns = {name: column[rows] if column.is_floating_point() else column[rows].long()
               for name, column in records.columns().items()}
    traffic = RecordedTraffic(shards=tuple(shards), sizes=tuple(map(len, parts)), rows=rows, **columns,
                              fresh_after=-math.inf if fresh_after is None else fresh_after)
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
