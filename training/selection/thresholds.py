"""Chooses exits and their thresholds for calibrated heads: certified, or by the paper's budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from early_exit.handler.exits.policy import NEVER
from early_exit.handler.exits.risk import Risk
from early_exit.training.selection.certify import most_failures
from early_exit.training.selection.simulation import Candidates, OperatingPoint, outcome
from early_exit.training.selection.subset import Option, Subset, best_subset, improved_subset

_MOST_SAFER = 8
_RATES = (0.0, *torch.logspace(-4, 1, 157, dtype=torch.float64).tolist())
_DECIMALS = 6
"""The decimals to which thresholds are rounded, so that other processors, whose sums may differ in the last bit, find
the same thresholds. The least agreeing confidence is not rounded."""


def least_agreeing(confidence: Tensor, agrees: Tensor) -> float:
    """Return the least confidence at which a head agrees; no threshold is chosen below it.

    Requests with a lower confidence, which other traffic may bring, do not leave: no record shows how the head answers
    them.

    Args:
        confidence: (N,) confidences on validation records.
        agrees: (N,) bool.
    """
    return float(confidence[agrees].min()) if bool(agrees.any()) else NEVER


def budget_threshold(confidence: Tensor, agrees: Tensor, budget: float) -> float:
    """Return the smallest threshold with hit rate x (1 - agreement) <= budget (section 3.3, equation 3).

    It is the confidence of a record, and at least the lowest confidence at which the head agrees.

    Args:
        confidence: (N,) confidences on validation records.
        agrees: (N,) bool.
        budget: the tolerated share, of all records, that leave here with another answer.

    >>> budget_threshold(torch.tensor([.9, .8, .7, .6]), torch.tensor([True, True, False, True]), 0.0)
    0.800000011920929
    """
    n_tolerated = int(budget * len(confidence) + 1e-9)
    wrong = confidence[~agrees].sort(descending=True).values
    least = least_agreeing(confidence, agrees)
    if len(wrong) <= n_tolerated:
        return least
    above = confidence[confidence > wrong[n_tolerated]]
    return max(least, float(above.min())) if len(above) else NEVER


def paper_point(tune: Candidates, tolerance: float) -> OperatingPoint:
    """Return the best subset when the n-th exit may spend T / 2^n (section 3.3)."""

    @cache
    def threshold(layer: int, position: int) -> float:
        return budget_threshold(tune.confidence[:, layer], tune.agrees[:, layer], tolerance / 2**position)

    @cache
    def option(layer: int, position: int) -> Option:
        return tune.option(layer, threshold(layer, position))

    subset = improved_subset(option, tune.costs, len(tune))
    return OperatingPoint(subset.layers, tuple(threshold(layer, n) for n, layer in enumerate(subset.layers, start=1)))


def equal_point(tune: Candidates, tolerance: float) -> OperatingPoint:
    """Return the best subset when each of m exits may spend T / m."""
    best, thresholds = Subset((), 1.0), tuple[float, ...]()
    for size in range(1, tune.n_layers + 1):
        levels = [budget_threshold(tune.confidence[:, layer], tune.agrees[:, layer], tolerance / size)
                  for layer in range(tune.n_layers)]
        options = [tune.option(layer, level) for layer, level in enumerate(levels)]
        subset = best_subset(lambda layer, position, options=options: options[layer],  # type: ignore[misc]
                             tune.costs, len(tune), size=size, best=best)
        if subset.cost < best.cost:
            best, thresholds = subset, tuple(levels[layer] for layer in subset.layers)
    return OperatingPoint(best.layers, thresholds)


def certified_path(tune: Candidates, tolerance: float, delta: float, n_certify: int) -> list[OperatingPoint]:
    """Return the settings to certify, from "never exit" to aggressive.

    The settings share one subset of exits. They differ in the rate: the chance of an error that is accepted for each
    unit of cost that is saved. The subset is the one that costs least on *tune*, over several rates, among the subsets
    that lose no more there than the certify part can accept.

    Args:
        tune: records of the tune part.
        tolerance: T.
        delta: 1 - confidence.
        n_certify: the number of records to certify with.
    """
    # The binomial test would accept this many failures. For the other risks the number is a guess, and that suffices:
    # the walk on the certify part chooses the rate again, and a budget that was made for the test of those risks led to
    # subsets of equal cost. The losses of the engine without exits are subtracted, because they occur in any case.
    max_loss = len(tune) * most_failures(n_certify, tolerance, delta) / n_certify - tune.full_losses.sum().item()
    best = Subset((), 1.0)
    by_rate = list(zip(*(_thresholds(tune, layer) for layer in range(tune.n_layers))))
    for thresholds in by_rate[::-4]:
        options = [tune.option(layer, least) for layer, least in enumerate(thresholds)]
        best = improved_subset(lambda layer, position, options=options: options[layer],  # type: ignore[misc]
                               tune.costs, len(tune), max_loss=max_loss, best=best)
    return [OperatingPoint(best.layers, tuple(thresholds[layer] for layer in best.layers)) for thresholds in by_rate]


def _thresholds(tune: Candidates, layer: int) -> list[float]:
    """Return the confidence threshold of a candidate for each rate in `_RATES`.

    A threshold maximises the rate times the share of the backbone that is saved minus the chance of an error, summed
    over all records that leave. The first exit saves more than the last, so it may risk more. At the rate 0, no record
    leaves. Records whose confidence is below that of all records on which the head agrees never leave.
    """
    least = least_agreeing(tune.confidence[:, layer], tune.agrees[:, layer])
    confidence, order = tune.confidence[:, layer].sort(descending=True)
    confidence = confidence[confidence >= least]
    risked = functional.pad(tune.error_chance[order, layer].double().cumsum(dim=0), (1, 0))  # [n] when n leave
    # Records of equal confidence leave together.
    n_leaving = torch.tensor([0, *(confidence[1:] < confidence[:-1]).nonzero().flatten().add(1).tolist(),
                              len(confidence)])
    saved, rounding = tune.costs.saved[layer], len(tune) * 10.0**-_DECIMALS
    thresholds = [NEVER]
    for rate in _RATES[1:]:
        # If the confidence is the chance of no error, this is the best threshold for all requests, recorded or not.
        threshold = max(least, round(1 - rate * saved, _DECIMALS))
        n_leave = int((confidence >= threshold).sum())
        gains = rate * saved * n_leaving - risked[n_leaving]
        n_best = int(n_leaving[gains.argmax()])
        if gains.max() > rate * saved * n_leave - risked[n_leave] + rounding:
            threshold = max(least, _rounded_down(confidence[n_best - 1].item())) if n_best else NEVER
        thresholds.append(min(threshold, thresholds[-1]))
    return thresholds


def _rounded_down(confidence: float) -> float:
    return math.floor(confidence * 10.0**_DECIMALS) / 10.0**_DECIMALS


def safer_settings(path: Sequence[OperatingPoint], deployed: int, tune: Candidates) -> tuple[tuple[float, ...], ...]:
    """Return the thresholds of the fallback levels: the settings before the deployed one, nearest first.

    Beyond the losses without exits, each level loses at most half as much on *tune* as the setting before it in this
    order, so a few levels suffice for any drift. The levels end with one that loses nothing there and still lets
    requests leave, if there is one. Each was certified before the deployed setting was tried.
    """
    settings: list[tuple[float, ...]] = []
    least = tune.full_losses.sum().item()
    allowed = (outcome(path[deployed], tune).losses.sum().item() - least) / 2
    for point in path[1:deployed][::-1]:
        simulated = outcome(point, tune)
        if not bool((simulated.exit >= 0).any()) or len(settings) == _MOST_SAFER:
            break
        if (lost := simulated.losses.sum().item() - least) <= allowed:
            settings.append(point.thresholds)
            if lost <= 0:
                break
            allowed = lost / 2
    return tuple(settings)


def confidence_levels(count: int = 121) -> list[float]:
    """Return confidences from 0.9999 down to 0.3, denser near 1, where differences matter."""
    return (1 - torch.logspace(-4, torch.log10(torch.tensor(0.7)).item(), count, dtype=torch.float64)).tolist()


def expected_losses(risk: Risk, losses: Tensor, error_chance: Tensor) -> Tensor:
    """Return the (N, L) losses by which exits are chosen, which are less noisy than the observed ones.

    Whether an answer differs is random, and the calibrated chance of an error is its expected value. Among hundreds of
    subsets of exits, the best one by observed losses is too often just a lucky one. The confidence gap is such an
    expected value already. For the risk `accuracy`, no expected value is known.

    Args:
        risk: what the losses measure.
        losses: (N, L) observed losses.
        error_chance: (N, L) calibrated chances of an error.
    """
    return error_chance if risk is Risk.DISAGREEMENT else losses
