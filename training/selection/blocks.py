"""Groups records into blocks: neighbours that are alike, such as frames of one scene, count as one piece of evidence.

A block begins where the content changes: there, a record is no more like those before it than records far apart are.
The length of a block, and the distance up to which records are alike, are fixed on earlier records. The distance is
the smallest of a few for which neighbouring blocks are no more alike than others. Frames of one scene need a small
distance; requests of one class, which a client may send in a row, need a larger one. The autocorrelation of the states
shows whether neighbours are alike at all, with the band of Politis and White (2004, Automatic block-length selection
for the dependent bootstrap): lags are noise from the first one on of which K in a row stay below 2 sqrt(log10 n / n).
Likeness that lasts for longer than a tenth of the records is a trend: it is removed, and reported.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from early_exit.handler.exits.likeness import LEAST, REACH, Likeness

_COMPONENTS = 16
"""The number of directions, those of the largest variance, in which states are compared."""
_ALIKE = (0.01, 0.03, 0.1)
"""The shares of pairs of distant records that count as alike, from strict to loose."""
_NEAR = 5
"""The number of lags in a row that must be noise before all further lags count as noise."""
_PAIRS = 20_000
_TREND = 0.1
_FEWEST = 100
"""The fewest records from which likeness can be found; fewer records certify nothing either."""


def blocks_of(alike: Likeness, states: Tensor, position: Tensor) -> Tensor:
    """Return the (N,) int64 number of each record's block, ascending from 0.

    The monitor does the same sample by sample, see `handler.monitor.blocks`.

    Args:
        alike: how records are compared.
        states: (N, K) states of the records, in their order.
        position: (N,) float64, how many requests were served before each.
    """
    n = len(states)
    if not alike.length:
        return torch.arange(n)
    changes = _changes(alike.components(states), alike.distance)
    begins = torch.zeros(n, dtype=torch.int64)
    may_begin = changes.nonzero().flatten() + 1
    earliest = position[may_begin]
    at = 0
    while n:
        found = int(torch.searchsorted(earliest, position[at] + LEAST * alike.length))
        if found == len(may_begin):
            break
        at = int(may_begin[found])
        begins[at] = 1
    return begins.cumsum(dim=0)


def likeness(states: Tensor, position: Tensor) -> Likeness:
    """Return how alike neighbouring records are; the records must be earlier than those that are to prove something.

    Args:
        states: (N, K) log-probabilities of the backbone for the records, in their order.
        position: (N,) float64, how many requests were served before each.
    """
    x = states.float()
    mean = x.mean(dim=0) if len(x) else torch.zeros(x.shape[1])
    _, spread, directions = torch.linalg.svd((x - mean)[:_PAIRS], full_matrices=False)
    kept = spread > 1e-4 * max(1e-12, float(spread[:1].sum()))
    directions = (directions[kept].T / spread[kept] * math.sqrt(max(1, len(x[:_PAIRS]))))[:, :_COMPONENTS]
    components = (x - mean) @ directions
    n = len(x)
    most = max(1, int(_TREND * n))
    if n < _FEWEST or not components.shape[1]:
        return Likeness(mean, directions, 0.0, 0.0, is_trend=False)
    is_trend = _first_noise(components, most) >= most
    lag = _first_noise(_without_trend(components, most), most)
    far = _far_pairs(components)
    requests = float((position[-1] - position[0]) / max(1, n - 1))
    found = [Likeness(mean, directions, float(torch.quantile(far, share)), 0.0, is_trend) for share in _ALIKE]
    n_changes = int(_changes(components, found[0].distance).sum())
    # Neighbours may be alike more often than by chance although all lags are noise, as with rare exact repeats.
    n_by_chance = REACH**2 * float((far < found[0].distance).double().mean())
    if not lag and 1 - (n_changes + 1) / n <= n_by_chance + 5 * math.sqrt(n_by_chance / n):
        return found[0]
    for one in found:
        runs = _run_lengths(_changes(components, one.distance), position)
        alike = replace(one, length=max(requests, float(runs.median())))
        if not _neighbours_alike(components, blocks_of(alike, x, position)):
            return alike
    return replace(found[0], length=max(alike.length, lag * requests / LEAST))


def _neighbours_alike(components: Tensor, block: Tensor) -> bool:
    """Tell whether the means of neighbouring blocks are more alike than noise, with the trend removed.

    Args:
        components: (N, D) components of the records.
        block: (N,) numbers of their blocks, ascending from 0.
    """
    n = int(block[-1]) + 1
    means = torch.zeros(n, components.shape[1]).index_add(0, block, components) / torch.bincount(block)[:, None]
    x = _standardised(_without_trend(means, max(1, int(_TREND * n))))
    return any(_autocorrelation(x, lag) >= _band(n) for lag in range(1, min(_NEAR, n - 1) + 1))


def _first_noise(components: Tensor, most: int) -> int:
    """Return the lag from which on the mean autocorrelation of (N, D) components is noise; 0 if it always is."""
    x, n = _standardised(components), len(components)
    needed, run = max(_NEAR, int(math.sqrt(math.log10(n)))), 0
    for lag in range(1, min(most + needed, n - 2) + 1):
        run = run + 1 if abs(_autocorrelation(x, lag)) < _band(n) else 0
        if run == needed:
            return lag - needed
    return most


def _standardised(components: Tensor) -> Tensor:
    return (components - components.mean(dim=0)) / components.std(dim=0, correction=0).clamp_min(1e-12)


def _autocorrelation(x: Tensor, lag: int) -> float:
    return float((x[:-lag] * x[lag:]).mean())


def _band(n: int) -> float:
    return 2 * math.sqrt(math.log10(n) / n)


def _without_trend(components: Tensor, window: int) -> Tensor:
    """Return (N, D) components minus their mean over a window around each."""
    total = torch.nn.functional.pad(components.double().cumsum(dim=0), (0, 0, 1, 0))
    at = torch.arange(len(components))
    first, last = (at - window).clamp_min(0), (at + window + 1).clamp_max(len(components))
    return (components - ((total[last] - total[first]) / (last - first)[:, None])).float()


def _changes(components: Tensor, distance: float) -> Tensor:
    """Return a (N - 1,) bool mask of the records after which the content changes."""
    n = len(components)
    alike = torch.zeros(max(0, n - 1), dtype=torch.bool)
    for gap in range(1, 2 * REACH):
        if gap >= n:
            break
        near = (components[gap:] - components[:-gap]).square().sum(dim=1) < distance  # [i]: i and i + gap
        for before in range(min(gap, REACH)):  # at the border after i + before, i lies before it and i + gap after it
            if gap - before > REACH:
                continue
            alike[before:before + len(near)] |= near[:len(alike) - before]
    return ~alike


def _run_lengths(changes: Tensor, position: Tensor) -> Tensor:
    """Return the (R,) float64 numbers of requests between changes."""
    edges = torch.cat([torch.tensor([0]), changes.nonzero().flatten() + 1])
    starts = position[edges].double()
    mean = (position[-1] - position[0]).double() / max(1, len(position) - 1)
    return torch.cat([starts[1:], position[-1:].double() + mean]) - starts


def _far_pairs(components: Tensor) -> Tensor:
    """Return the squared distances of random pairs of records that lie at least a tenth of all records apart."""
    n, generator = len(components), torch.Generator().manual_seed(0)
    first = torch.randint(n, (_PAIRS,), generator=generator)
    apart = torch.randint(max(1, n // 10), max(2, n - n // 10), (_PAIRS,), generator=generator)
    return (components[first] - components[(first + apart) % n]).square().sum(dim=1)
