"""Groups records into blocks: neighbours that are alike, such as frames of one scene, count as one piece of evidence.

A block begins where the content changes: there, a record is no more like those before it than records far apart are.
Where records that are alike do not follow each other, blocks are periods of time. `selection.likeness` finds out, on
earlier records, how long blocks are and up to which distance records are alike.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from early_exit.handler.exits.likeness import LEAST, REACH, Likeness


def blocks_of(alike: Likeness, states: Tensor, position: Tensor, content: Tensor | None = None) -> Tensor:
    """Return the (N,) int64 number of each record's block, ascending from 0.

    The monitor does the same sample by sample, see `handler.monitor.blocks`.

    Args:
        alike: how records are compared.
        states: (N, K) states of the records, in their order.
        position: (N,) float64, how many requests were served before each.
        content: (N,) int64 hashes of the contents; by default all contents differ. A copy of an earlier record, such as
            a health check, does not end a block, keep it open or make it longer.
    """
    n = len(states)
    if not alike.length:
        return torch.arange(n)
    original = originals(n, content)
    changes = changes_between(alike.components(states[original]), alike.distance)
    requests = requests_before(position, original)
    may_change = changes.nonzero().flatten() + 1
    change_at = requests[may_change]
    begins = torch.zeros(n, dtype=torch.int64)
    at = 0
    while n:
        change = int(torch.searchsorted(change_at, requests[at] + LEAST * alike.length))
        at = min(int(may_change[change]) if change < len(may_change) else len(original),
                 int(torch.searchsorted(requests, requests[at] + alike.longest)))
        if at == len(original):
            break
        begins[original[at]] = 1
    return begins.cumsum(dim=0)


def requests_before(position: Tensor, original: Tensor) -> Tensor:
    """Return the (M,) float64 numbers of requests before each of M records.

    Each record stands for the requests since the record before it. Requests of records other than the M are left out.

    Args:
        position: (N,) float64, how many requests were served before each of N records.
        original: (M,) positions of records among the N, ascending.
    """
    return position.diff(prepend=position[:1])[original].cumsum(dim=0)


def originals(n: int, content: Tensor | None) -> Tensor:
    """Return the (M,) positions, ascending, of the first record of each content among N records.

    Args:
        n: N.
        content: (N,) hashes of contents, or None if all contents differ.
    """
    if content is None:
        return torch.arange(n)
    return torch.from_numpy(np.sort(np.unique(content.numpy(), return_index=True)[1]))


def changes_between(components: Tensor, distance: float) -> Tensor:
    """Return a (N - 1,) bool mask of the records after which the content changes.

    Args:
        components: (N, D) components of the records, in their order.
        distance: squared distance below which two records are alike.
    """
    n = len(components)
    alike = torch.zeros(max(0, n - 1), dtype=torch.bool)
    for gap in range(1, 2 * REACH):
        if gap >= n:
            break
        near = (components[gap:] - components[:-gap]).square().sum(dim=1) < distance  # [i]: i and i + gap
        for before in range(min(gap, REACH)):  # the border after record i + before lies between i and i + gap
            if gap - before > REACH:
                continue
            alike[before:before + len(near)] |= near[:len(alike) - before]
    return ~alike
