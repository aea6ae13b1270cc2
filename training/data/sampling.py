"""Makes one sample of records that several workers drew at different rates, and that end at different times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SPREAD = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number, for Fibonacci hashing."""
_GAPS = 10
"""The time before a worker's first record and after its last one, in mean gaps between all records of the same rate."""


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


def common_end(time: Tensor, worker: Tensor, folder: Tensor, proves: Tensor,
               share: float) -> tuple[float, Sequence[int]]:
    """Return the Unix time up to which all hosts have records, and the folders of hosts that ended long before.

    The records of a host may end before those of others: its folder is a copy that lags behind, its newest shard is not
    sealed yet, or its clock is behind. The newest records would then be those of the other hosts, and a certificate
    from them would not be about its requests. It is not known whether a host lags behind or has served nothing since.
    A host counts as ended if more than a share of the records is newer than its own. None of its records would be in
    such a share, and its requests are not what a certificate on that share is about.

    Args:
        time: (N,) float64 Unix seconds.
        worker: (N,) int64 number of the worker that recorded each.
        folder: (N,) int64 number of the folder that each record is in, one for each host. Copies of a host's folder
            have records of the same workers and end with them.
        proves: (N,) bool: the records that can be evidence.
        share: the share of the records, the newest ones, that a certificate is to be about.
    """
    folders = torch.unique(folder)
    if len(folders) < 2 or not bool(proves.any()):
        return math.inf, []
    end_of_worker = torch.full((int(worker.max()) + 1,), -math.inf, dtype=time.dtype)
    end_of_worker.scatter_reduce_(0, worker, time, "amax")
    ends = {number: end_of_worker[worker[folder == number]].max() for number in folders.tolist()}
    ended = [number for number, end in ends.items() if (time[proves] > end).double().mean() > share]
    return min(float(end) for number, end in ends.items() if number not in ended), ended
