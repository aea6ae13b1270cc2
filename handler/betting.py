"""Testing by betting: a gambler bets against a hypothesis, and the capital is at any time the evidence against it.

A gambler begins with a capital of 1. In each round the gambler places a bet b, which is fixed before the round, on a
gain g. The expected value of g is at most 0 while the hypothesis holds. The capital is multiplied by 1 + b g, which is
never negative. While the hypothesis holds, the expected capital does not grow, so the probability that it ever reaches
1 / p is at most p (Ville's inequality), however often one looks. The same is true if the capital is spread over several
gamblers, or if a part of it is kept out of the game. (Waudby-Smith and Ramdas, Estimating means of bounded random
variables by betting, Journal of the Royal Statistical Society B 86, 2024, sections 3 and 4.)

Three tests use this method: the bypass of exits that do not save time, the monitor's alarm, and the certificate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def after_round(capital: Sequence[float], bets: Sequence[float], gain: float, *, put_down: float = 0.0,
                ) -> tuple[float, ...]:
    """Return the capital of each gambler after a round.

    Args:
        capital: the capital of each gambler before the round.
        bets: one bet for each gambler.
        gain: the gain of the round, the same for all gamblers.
        put_down: the amount that each gambler adds to its capital before the round.

    >>> after_round((1.0, 1.0), (0.5, 1.0), 0.5)
    (1.25, 1.5)
    """
    return tuple((has + put_down) * (1 + bet * gain) for has, bet in zip(capital, bets))


def wealth(capital: Sequence[float], *, kept: float = 0.0) -> float:
    """Return the mean capital of the gamblers plus the capital that is kept out of the game."""
    return sum(capital) / len(capital) + kept


def rejects(wealth: float, delta: float) -> bool:
    """Tell whether a wealth rejects the hypothesis. The probability of ever rejecting a true one is at most delta."""
    return wealth >= 1 / delta


def p_value(log_capital: float) -> float:
    """Return the smallest delta at which the largest capital so far, given as its logarithm, rejects the hypothesis.

    >>> p_value(0.0), round(p_value(math.log(50)), 6)
    (1.0, 0.02)
    """
    return math.exp(-max(0.0, log_capital))
