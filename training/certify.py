"""A guarantee without labels: P(served != backbone) <= T with probability 1 - delta.

Fixed-sequence testing (Angelopoulos et al. 2021, Learn then Test): the path of ever more aggressive
settings is laid down on other records; the first setting whose hypothesis "risk > T" cannot be rejected
ends the walk, and the one before it is deployed. No correction for the number of tests is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from scipy.stats import binom

from early_exit.handler.errors import RecordError


def p_value(k: int, n: int, tolerance: float) -> float:
    """Return P(Binomial(n, tolerance) <= k): how likely so few differences are at exactly the tolerated rate."""
    return float(binom.cdf(k, n, tolerance))


def most_failures(n: int, tolerance: float, delta: float) -> int:
    """Return the largest k that certifies the tolerance on n records, or -1 when none does.

    >>> most_failures(299, 0.01, 0.05), most_failures(298, 0.01, 0.05)
    (0, -1)
    """
    k = int(binom.ppf(delta, n, tolerance)) + 1
    while k >= 0 and p_value(k, n, tolerance) > delta:
        k -= 1
    return k


def records_needed(tolerance: float, delta: float) -> int:
    """Return the fewest records that can certify a tolerance: those on which not one answer differs.

    >>> records_needed(0.01, 0.05)
    299
    """
    return math.ceil(math.log(delta) / math.log1p(-tolerance))


def require_enough(n: int, share: float, tolerance: float, delta: float) -> None:
    """Check that the certify part can certify anything.

    Args:
        n: records in the certify part.
        share: its fraction of all records.
        tolerance: T.
        delta: 1 - confidence.

    Raises:
        RecordError: it is too small; the message says how many records are needed.
    """
    least = records_needed(tolerance, delta)
    if n < least:
        raise RecordError(
            f"{n} records to certify with, but {tolerance:.2%} at {1 - delta:.0%} confidence needs at least {least} "
            f"even if no answer differs: collect about {math.ceil(1.2 * least / share)} records in all (twice that to "
            f"tolerate differences), or ask for a larger --tolerance. No plan was written")


def walk(failures: Iterable[int], n: int, tolerance: float, delta: float) -> int:
    """Return the index of the last setting of a path that is certified.

    Args:
        failures: for each setting, from "never exit" on, how many of the n records are answered differently.

    Returns:
        The index before the first setting that fails its test.

    Raises:
        RecordError: already the first setting fails: too few records.
    """
    certified = -1
    for index, k in enumerate(failures):
        if p_value(k, n, tolerance) > delta:
            break
        certified = index
    if certified < 0:
        raise RecordError(f"{n} records cannot certify {tolerance:.2%} at {1 - delta:.0%} confidence")
    return certified
