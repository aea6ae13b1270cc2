"""Makes one sample of records that several workers drew at different rates."""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number, for Fibonacci hashing."""


def at_one_rate(time: Tensor, worker: Tensor, rate: Tensor, request: Tensor) -> Tensor:
    """Return a (N,) bool mask of records that are drawn at one rate from all requests of their time.

    Workers that serve different traffic may record different shares of it, because of their settings or because one of
    them has reached its last fallback level. A mean over all records would then give too little weight to the traffic
    that is recorded rarely. At each time, records are therefore drawn as if every worker had recorded at the lowest
    rate of all workers at that time. The rate may change with time. A hash of the request draws.

    Args:
        time: (N,) float64 Unix seconds.
        worker: (N,) int64 number of the worker that recorded each.
        rate: (N,) float32 probability with which the worker drew each.
        request: (N,) int64 uniform hash of each record's request.
    """
    if not len(rate) or bool((rate == rate[0]).all()):
        return torch.ones(len(rate), dtype=torch.bool)
    lowest = rate.clone()
    for number in torch.unique(worker):
        of_worker = (worker == number).nonzero().flatten()
        of_worker = of_worker[torch.argsort(time[of_worker], stable=True)]
        times = time[of_worker]
        meanwhile = ((time >= times[0]) & (time <= times[-1])).nonzero().flatten()
        last = torch.searchsorted(times, time[meanwhile], right=True) - 1
        lowest[meanwhile] = torch.minimum(lowest[meanwhile], rate[of_worker[last]])
    uniform = (request * SPREAD).double() / 2.0**64 + 0.5
    return uniform < lowest / rate
