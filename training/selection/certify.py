"""A guarantee: the expected loss of the served answers is at most T, with probability 1 - delta.

Fixed-sequence testing (Angelopoulos et al. 2021, Learn then Test): the path of ever more aggressive
settings is fixed on other records; the first setting whose hypothesis "risk > T" cannot be rejected
ends the walk, and the one before it is deployed. No correction for the number of tests is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.special import bdtr
from torch import Tensor

from early_exit.handler import betting
from early_exit.handler.exits.risk import Risk


def method_of(risk: Risk, *, in_blocks: bool) -> str:
    """Return the name of the test that certifies a plan.

    Args:
        risk: what the losses measure.
        in_blocks: whether any block has several records.

    >>> method_of(Risk.DISAGREEMENT, in_blocks=False), method_of(Risk.DISAGREEMENT, in_blocks=True)
    ('fixed-sequence test, exact binomial', 'fixed-sequence test, betting')
    """
    is_exact = risk is Risk.DISAGREEMENT and not in_blocks
    return f"fixed-sequence test, {'exact binomial' if is_exact else 'betting'}"


def risk_p_value(risk: Risk, losses: Tensor, tolerance: float, delta: float) -> float:
    """Return a p-value of the hypothesis that the expected loss is above T.

    Args:
        risk: what the losses measure.
        losses: (N,) losses of independent records.
        tolerance: T.
        delta: the level with which the p-value will be compared; it tunes the bets and nothing else.
    """
    if risk is Risk.DISAGREEMENT:
        return p_value(int(losses.sum()), len(losses), tolerance)
    span = 1 - risk.lowest
    return betting_p_value((losses.double().numpy() - risk.lowest) / span, (tolerance - risk.lowest) / span, delta)


def p_value(k: int, n: int, tolerance: float) -> float:
    """Return P(Binomial(n, tolerance) <= k): the probability of so few differences at exactly the tolerated rate."""
    return float(bdtr(min(k, n), n, tolerance)) if k >= 0 else 0.0


def betting_p_value(losses: np.ndarray, tolerance: float, delta: float, expected: float | None = None) -> float:
    """Return a p-value of "mean > T" for losses in [0, 1], valid for any distribution.

    On every record, a bet is placed that the mean is below T (see `betting`): the gain is T - loss. The bets adapt to
    the variance of the losses so far (Waudby-Smith and Ramdas 2024, section 4.2).

    Args:
        losses: (N,) losses, in their order.
        tolerance: T.
        delta: the level with which the p-value will be compared; it tunes the bets and nothing else.
        expected: the number of losses for which the bets are tuned, by default N. It must not depend on the losses. The
            number of blocks in a given number of records may depend on them.
    """
    n = len(losses)
    expected = n if expected is None else expected
    count = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(losses)) / (count + 1)
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variance])[:n]  # a bet may depend on the past only
    bets = np.minimum(np.sqrt(2 * math.log(1 / delta) / (expected * before)), 0.95 / (1 - tolerance))
    log_capital = np.cumsum(np.log1p(bets * (tolerance - losses)))  # a product of thousands would overflow, or vanish
    return betting.p_value(float(log_capital.max(initial=0.0)))


def most_failures(n: int, tolerance: float, delta: float) -> int:
    """Return the largest k that certifies the tolerance on n records, or -1 when none does.

    >>> most_failures(299, 0.01, 0.05), most_failures(298, 0.01, 0.05)
    (0, -1)
    """
    return int(np.count_nonzero(bdtr(np.arange(n), n, tolerance) <= delta)) - 1


def records_needed(tolerance: float, delta: float) -> int:
    """Return the smallest number of records that can certify a tolerance, if no answer differs.

    >>> records_needed(0.01, 0.05)
    299
    """
    return math.ceil(math.log(delta) / math.log1p(-tolerance))


def walk(p_values: Iterable[float], delta: float) -> int:
    """Return the index of the last setting of a path that is certified.

    Args:
        p_values: one for each setting, from "never exit" on.
        delta: 1 - confidence.

    Returns:
        The index before the first setting that fails its test; -1 if that is the first one.
    """
    certified = -1
    for index, p in enumerate(p_values):
        if p > delta:
            break
        certified = index
    return certified
