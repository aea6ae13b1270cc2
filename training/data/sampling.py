"""Makes one sample of records that several workers drew at different rates, and that end at different times."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SPREAD = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number, for Fibonacci hashing."""
_GAPS = 10
"""The time before a worker's first record and after its last one, in mean gaps between all records of the same rate."""

_SILENT_GAPS = 3
"""How many mean gaps between its records a host may be silent before it is taken to have ended or to lag behind."""


def at_one_rate(time: Tensor, worker: Tensor, rate: Tensor, request: Tensor) -> Tensor:
    """Return a (N,) bool mask of records that are drawn at one rate from all requests of their time.

    Workers that serve different traffic may record different shares of it, because of their settings or because one of
    them has reached its last fallback level. A mean over all records would then give too little weight to the traffic
    that is recorded rarely. At each time, records are therefore drawn as if every worker had recorded at the lowest
    rate of all workers at that time. The rate may change with time. A hash of the request draws.

    A worker serves for longer than from its first to its last record. If it records rarely, or is restarted often, much
    of the time lies before, after or between the records of such workers. Each worker therefore counts for some more
    time on both sides.

    Args:
        time: (N,) float64 Unix seconds.
        worker: (N,) int64 number of the worker that recorded each.
        rate: (N,) float32 probability with which the worker drew each.
        request: (N,) int64 uniform hash of each record's request.
    """
    if not len(rate) or bool((rate == rate[0]).all()):
        return torch.ones(len(rate), dtype=torch.bool)
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
    uniform = (request * SPREAD).double() / 2.0**64 + 0.5
    return uniform < lowest / rate


def common_end(time: Tensor, host: Tensor, request: Tensor, share: float) -> float:
    """Return the Unix time up to which all hosts have records.

    The records of a host may end before those of others: its folder is a copy that lags behind, its newest shard is not
    sealed yet, or its clock is behind. The newest records would then be those of the other hosts, and a certificate
    from them would not be about its requests. It is not known whether a host lags behind or has served nothing since.
    A host counts as one that has ended if more than a share of the requests is newer than its own. None of its requests
    would be in such a share, and a certificate on that share is not about them.

    A host that records rarely is silent for some time without having ended. Few of its requests can be missing then.

    Args:
        time: (N,) float64 Unix seconds of the records that can be evidence.
        host: (N,) int64 number of the host that recorded each.
        request: (N,) int64 hash of each record's request, all records of which count as one.
        share: the share of the requests, the newest ones, that a certificate is to be about.
    """
    _, first = np.unique(request.numpy(), return_index=True)
    time, host = time[torch.from_numpy(first)], host[torch.from_numpy(first)]
    ends = []
    for number in torch.unique(host):
        of_host = time[host == number]
        first_one, last = of_host.min(), of_host.max()
        silent = _SILENT_GAPS * (last - first_one) / (len(of_host) - 1) if len(of_host) > 1 else math.inf
        if (time > last + silent).double().mean() <= share:
            ends.append(float(last + silent))
    return min(ends, default=math.inf)
