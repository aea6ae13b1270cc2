"""Finds in records how long requests stay alike, and up to which distance they are alike. Blocks are formed by both.

Frames of one scene need a small distance; requests of one class, which a client may send in a row, need a larger one.
A few distances are tried, and the smallest one is used at which neighbouring blocks are no more alike than others. The
autocorrelation of the states shows whether neighbours are alike at all, with the band of Politis and White (2004,
Automatic block-length selection for the dependent bootstrap): if the autocorrelation stays below 2 sqrt(log10 n / n) at
several lags in a row, these lags and all larger ones are noise.

Records may also be alike at a distance in time, as the frames of several cameras are. Pairs of records that are nearly
equal are therefore counted at all lags up to a tenth of the records. If such pairs are more frequent at some lags than
among records far apart, blocks are periods, unless blocks that begin at changes hold these pairs together and give at
least as much evidence. A period is as long as the largest of these lags.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from early_exit.handler.exits.likeness import LEAST, REACH, Likeness
from early_exit.training.selection.blocks import blocks_of, changes_between, originals, requests_before

_COMPONENTS = 16
"""The number of directions, those of the largest variance, in which states are compared."""
_ALIKE = (0.01, 0.03, 0.1)
"""The shares of pairs of distant records that count as alike, from strict to loose."""
_NEARLY_EQUAL = 0.001
"""The share of pairs of distant records that count as nearly equal."""
_CROWDED = 0.04
"""Lags count as alike if more than this share of blocks have more nearly equal records at these lags than chance
explains. The share must also exceed the share at distant lags by this much."""
_MOST_LAGS, _MOST_COMPARED = 256, 1500
"""The largest numbers of lags in a range of lags, and of records, that are compared."""
_NEAR = 5
"""The number of lags in a row that must be noise before all further lags count as noise."""
_PAIRS = 200_000
_FOR_DIRECTIONS = 20_000
_TREND = 0.1
_FEWEST = 100
"""The fewest records from which likeness can be found; fewer records certify nothing either."""


def likeness(states: Tensor, position: Tensor, content: Tensor | None = None) -> Likeness:
    """Return how alike neighbouring records are; the records must be earlier than those that are to be evidence.

    Args:
        states: (N, K) log-probabilities of the backbone for the records, in their order.
        position: (N,) float64, how many requests were served before each.
        content: (N,) int64 hashes of the contents; by default all contents differ. Copies are not compared.
    """
    original = originals(len(states), content)
    x, position = states[original].float(), requests_before(position, original)
    n = len(x)
    mean, directions = _directions(x)
    nothing = Likeness(mean, directions, 0.0, 0.0)
    if n < _FEWEST or not directions.shape[1]:
        return nothing
    components = nothing.components(x)
    far = _far_pairs(components)
    by_change = _by_change(nothing, components, x, position, far)
    block = blocks_of(by_change, x, position)
    nearly_equal = float(torch.quantile(far, _NEARLY_EQUAL))
    lag = _last_lag_alike(components, nearly_equal, torch.arange(n))
    if not lag:
        return by_change
    is_explained = not _last_lag_alike(components, nearly_equal, block)
    if is_explained and int(block[-1]) + 1 >= n / (2 * lag):  # otherwise periods give more evidence
        return by_change
    return replace(nothing, length=lag * _requests(position) / LEAST)


def has_trend(alike: Likeness, states: Tensor, position: Tensor, content: Tensor) -> bool:
    """Tell whether records stay alike for longer than a tenth of all.

    The means of blocks are compared at lags of a twentieth to a tenth of the number of blocks. Single records are not
    compared, because records of one block are alike anyway. With n independent blocks, the mean autocorrelation of a
    component at W lags has the standard deviation 1 / sqrt(n W).

    Args:
        alike: the result of `likeness` for these records.
        states: (N, K) log-probabilities of the backbone for the records, in their order.
        position: (N,) float64, how many requests were served before each.
        content: (N,) int64 hashes of the contents.
    """
    if len(states) < _FEWEST or not alike.directions.shape[1]:
        return False
    x = _standardised(_means(alike.components(states), blocks_of(alike, states, position, content)))
    n = len(x)
    last = int(_TREND * n)
    if last < 4:
        return False
    lags = range(last // 2, last)
    found = torch.stack([(x[:-lag] * x[lag:]).mean(dim=0) for lag in lags]).mean(dim=0)
    return float(found.max()) * math.sqrt(n * len(lags)) > 5.0


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (K,) mean of (N, K) states, and the (K, D) directions in which they have the variance 1."""
    mean = x.mean(dim=0) if len(x) else torch.zeros(x.shape[1])
    _, spread, directions = torch.linalg.svd((x - mean)[:_FOR_DIRECTIONS], full_matrices=False)
    kept = spread > 1e-4 * max(1e-12, float(spread[:1].sum()))
    n = max(1, len(x[:_FOR_DIRECTIONS]))
    return mean, (directions[kept].T / spread[kept] * math.sqrt(n))[:, :_COMPONENTS]


def _by_change(nothing: Likeness, components: Tensor, x: Tensor, position: Tensor, far: Tensor) -> Likeness:
    """Return the likeness by which blocks begin where the content changes."""
    n = len(x)
    most = max(1, int(_TREND * n))
    lag = _first_noise(_without_trend(components, most), most)
    found = [replace(nothing, distance=float(torch.quantile(far, share))) for share in _ALIKE]
    n_changes = int(changes_between(components, found[0].distance).sum())
    # Neighbours may be alike more often than by chance although all lags are noise.
    n_by_chance = REACH**2 * float((far < found[0].distance).double().mean())
    if not lag and 1 - (n_changes + 1) / n <= n_by_chance + 5 * math.sqrt(n_by_chance / n):
        return found[0]
    for one in found:
        runs = _run_lengths(changes_between(components, one.distance), position)
        alike = replace(one, length=max(_requests(position), float(runs.median())))
        block = blocks_of(alike, x, position)
        if not _neighbours_alike(components, block):
            return replace(alike, longest=2 * _longest(block, position))
    alike = replace(found[0], length=max(alike.length, lag * _requests(position) / LEAST))
    return replace(alike, longest=2 * _longest(blocks_of(alike, x, position), position))


def _requests(position: Tensor) -> float:
    """Return the mean number of requests from one record to the next."""
    return float((position[-1] - position[0]) / max(1, len(position) - 1))


def _last_lag_alike(components: Tensor, nearly_equal: float, block: Tensor) -> int:
    """Return the lag, in records, above which records of different blocks are nearly equal only by chance; 0 if they
    always are.

    Lags up to a tenth of the records are examined, in ranges that double: 1, 2 to 3, 4 to 7 and so on. One record of
    each block is compared with records that follow it at the lags of a range, and with as many records at lags beyond a
    tenth of all records. The blocks with several nearly equal records are counted, not those records, so that a few odd
    scenes do not decide.

    Args:
        components: (N, D) components of the records, in their order.
        nearly_equal: a squared distance; a share `_NEARLY_EQUAL` of the pairs of distant records is below it.
        block: (N,) int64 number of each record's block, ascending from 0.
    """
    n, found = len(components), 0
    sizes = torch.bincount(block)
    middle = sizes.cumsum(dim=0) - 1 - sizes // 2
    chosen = middle[torch.linspace(0, len(middle) - 1, min(_MOST_COMPARED, len(middle))).long()]

    def crowded(first: int, end: int) -> float:
        compared = chosen[chosen + end <= n, None]
        later = compared + torch.linspace(first, end - 1, min(_MOST_LAGS, end - first)).round().long()
        distance = (components[later] - components[compared]).square().sum(dim=2)
        n_equal = ((block[later] != block[compared]) & (distance < nearly_equal)).sum(dim=1)
        expected = _NEARLY_EQUAL * later.shape[1]
        return float((n_equal > expected + 2 * math.sqrt(expected) + 0.5).double().mean())

    first, most = 1, max(2, int(_TREND * n))
    while first < most:
        end = min(2 * first, most)
        share = crowded(first, end)
        if share > _CROWDED and share > crowded(most + first, most + end) + _CROWDED:
            found = end
        first = end
    return found


def _neighbours_alike(components: Tensor, block: Tensor) -> bool:
    """Tell whether the means of neighbouring blocks are more alike than noise, with the trend removed.

    Args:
        components: (N, D) components of the records.
        block: (N,) numbers of their blocks, ascending from 0.
    """
    means = _means(components, block)
    x = _standardised(_without_trend(means, max(1, int(_TREND * len(means)))))
    return any(_autocorrelation(x, lag) >= _band(len(x)) for lag in range(1, min(_NEAR, len(x) - 1) + 1))


def _means(components: Tensor, block: Tensor) -> Tensor:
    """Return the (B, D) means of (N, D) components in each block."""
    total = torch.zeros(int(block[-1]) + 1, components.shape[1]).index_add(0, block, components)
    return total / torch.bincount(block)[:, None]


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


def _run_lengths(changes: Tensor, position: Tensor) -> Tensor:
    """Return the (R,) float64 numbers of requests between changes."""
    return _lengths(torch.cat([torch.tensor([0]), changes.nonzero().flatten() + 1]), position)


def _longest(block: Tensor, position: Tensor) -> float:
    """Return the number of requests in the longest block."""
    begins = torch.cat([torch.tensor([0]), (block[1:] > block[:-1]).nonzero().flatten() + 1])
    return float(_lengths(begins, position).max())


def _lengths(begins: Tensor, position: Tensor) -> Tensor:
    """Return the (R,) float64 numbers of requests in the runs that begin at some records."""
    starts = position[begins].double()
    return torch.cat([starts[1:], position[-1:].double() + _requests(position)]) - starts


def _far_pairs(components: Tensor) -> Tensor:
    """Return the squared distances of random pairs of records that lie at least a tenth of all records apart."""
    n, generator = len(components), torch.Generator().manual_seed(0)
    first = torch.randint(n, (_PAIRS,), generator=generator)
    apart = torch.randint(max(1, n // 10), max(2, n - n // 10), (_PAIRS,), generator=generator)
    return (components[first] - components[(first + apart) % n]).square().sum(dim=1)
