"""Makes one sample of records that several workers drew at different rates, that end at different times, or that were
dropped in part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from early_exit.handler.recording.format import ShardHeader

SPREAD = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number, for Fibonacci hashing."""
_GAPS = 10
"""The time before a worker's first record and after its last one, in mean gaps between all records of the same rate."""

_SILENT_GAPS = 3
"""How many mean gaps between its records a host may be silent before it is taken to have ended or to lag behind."""
_FEWEST_TIMES = 10
"""The fewest times of its newest records from which such a gap is told, if there are as many."""


def chance_at_one_rate(time: Tensor, worker: Tensor, rate: Tensor) -> Tensor:
    """Return the (N,) chances with which records must be drawn for one rate of all requests of their time.

    Workers that serve different traffic may record different shares of it, because of their settings or because one of
    them has reached its last fallback level. A mean over all records would then give too little weight to the traffic
    that is recorded rarely. At each time, records are therefore drawn as if every worker had recorded at the lowest
    rate of all workers at that time. The rate may change with time.

    A worker serves for longer than from its first to its last record. If it records rarely, or is restarted often, much
    of the time lies before, after or between the records of such workers. Each worker therefore counts for some more
    time on both sides.

    Args:
        time: (N,) float64 Unix seconds.
        worker: (N,) int64 number of the worker that recorded each.
        rate: (N,) float32 probability with which the worker drew each.
    """
    if not len(rate) or bool((rate == rate[0]).all()):
        return torch.ones(len(rate))
    margin = torch.zeros_like(time)
    for one in torch.unique(rate):
        at_rate = rate == one
        times = time[at_rate]
        margin[at_rate] = _GAPS * (times.max() - times.min()) / max(1, len(times) - 1)
    lowest = rate.clone()
    for number in torch.unique(worker):
        of_worker = (worker == number).nonzero().flatten()
        of_worker = of_worker[torch.argsort(time[of_worker], stable=True)]
        times, (first, last) = time[of_worker], of_worker[[0, -1]]
        meanwhile = ((time >= times[0] - margin[first]) & (time <= times[-1] + margin[last])).nonzero().flatten()
        latest = (torch.searchsorted(times, time[meanwhile], right=True) - 1).clamp_min(0)
        lowest[meanwhile] = torch.minimum(lowest[meanwhile], rate[of_worker[latest]])
    return lowest / rate


def drawn(request: Tensor, chance: Tensor) -> Tensor:
    """Return a (N,) bool mask that draws each record with its chance, by a hash of its request.

    Args:
        request: (N,) int64 uniform hash of each record's request.
        chance: (N,) float.
    """
    return (request * SPREAD).double() / 2.0**64 + 0.5 < chance


def common_end(time: Tensor, host: Tensor, request: Tensor, is_fresh: Tensor, share: float) -> tuple[float, list[int]]:
    """Return the Unix time up to which hosts have records, and the numbers of the hosts that have ended before.

    The records of a host may end before those of others: its folder is a copy that lags behind, its newest shard is not
    sealed yet, or its clock is behind. The newest records would then be those of the other hosts, and a certificate
    from them would not be about its requests. It is not known whether a host lags behind or has served nothing since.
    A host counts as one that has ended if more than a share of the requests is newer than its own: a certificate on
    such a share is not about them. The share is that of all requests, so that hosts which were replaced one after the
    other do not hold up more than this share together.

    A host that records rarely is silent for some time without having ended. Few of its requests can be missing then.
    How rarely is told by the newest share of its records, because it may have paused long ago, but by no fewer than ten
    times, because its requests may come in pairs or batches.

    Args:
        time: (N,) float64 Unix seconds of the records that can be evidence.
        host: (N,) int64 number of the host that recorded each.
        request: (N,) int64 hash of each record's request, all records of which count as one.
        is_fresh: (N,) bool mask of the records that may be in the certify part. Only they count for the share.
        share: the share of the requests, the newest ones, that a certificate is to be about.

    Returns:
        The time, and the hosts that have ended; the host whose records end last comes first.
    """
    _, first = np.unique(request.numpy(), return_index=True)
    time, host, is_fresh = (values[torch.from_numpy(first)] for values in (time, host, is_fresh))
    fresh = time[is_fresh]
    if not len(fresh):
        return math.inf, []
    ends: dict[int, float] = {}
    for number in torch.unique(host).tolist():
        times = torch.unique(fresh[host[is_fresh] == number])
        if not len(times):
            ends[number] = float(time[host == number].max())
            continue
        newest = times[-max(_FEWEST_TIMES, math.ceil(share * len(times))):]
        silent = _SILENT_GAPS * (newest[-1] - newest[0]) / (len(newest) - 1) if len(newest) > 1 else math.inf
        ends[number] = float(newest[-1] + silent)
    end = min((one for one in ends.values() if (fresh > one).double().mean() <= share), default=math.inf)
    return end, sorted((number for number, one in ends.items() if one < end), key=lambda number: -ends[number])


def dropped_share(headers: Sequence[ShardHeader], told: Sequence[Tensor], times: Sequence[Tensor],
                  chance: Sequence[Tensor], drawn_times: Tensor, certify: Tensor) -> float:
    """Return the share of records that workers dropped, among all drawn records of the time of those that certify.

    A dropped record counts with the chance with which it would have been drawn. When a clock was wrong, it is not known
    when records were dropped, so they count. A clock was ahead if it says that records were dropped after the newest
    record of their worker.

    Args:
        headers: the headers of S shards.
        told: for each shard, the (M,) Unix times that its worker wrote.
        times: for each shard, the same, corrected for changes of the clock.
        chance: for each shard, the chances at which those of its records that are in use are drawn.
        drawn_times: (N,) float64 Unix times of the drawn records.
        certify: (C,) float64 Unix times of the records that certify.
    """
    if not len(certify):
        return 0.0
    first, last = float(certify.min()), float(certify.max())
    newest: dict[str, float] = defaultdict(lambda: -math.inf)
    for header, corrected in zip(headers, times):
        newest[header.worker] = max([newest[header.worker], *corrected.tolist()])
    n = 0.0
    for header, written, corrected, of_shard in zip(headers, told, times, chance):
        begin, end = header.dropped
        is_later = begin > last and end > newest[header.worker]
        if (begin <= last and end >= first) or is_later or not torch.equal(written, corrected):
            n += header.n_dropped * (float(of_shard.mean()) if len(of_shard) else 1.0)
    return n / (n + int(((drawn_times >= first) & (drawn_times <= last)).sum()))
