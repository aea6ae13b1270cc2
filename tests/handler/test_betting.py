"""Bypass, monitor and certificate share one betting test; it is compared with a separate formula for each of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from early_exit.handler.betting import after_round, p_value, rejects, wealth
from early_exit.handler.exits.risk import Risk
from early_exit.handler.inference.bypass import BETS as BYPASS_BETS
from early_exit.handler.inference.bypass import Comparison
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import BETS as MONITOR_BETS
from early_exit.handler.monitor.sequential_test import Evidence
from early_exit.training.selection.certify import betting_p_value
from tests.support.shadow_samples import samples_of

SECONDS = st.floats(1e-4, 10)
LOSSES = st.floats(0, 1)


@given(bet=st.floats(0, 1), low=st.floats(-1, 0), high=st.floats(0.01, 1), capital=st.floats(0, 100))
def test_a_fair_round_leaves_the_expected_capital_as_it_is(bet: float, low: float, high: float, capital: float) -> None:
    chance_of_high = -low / (high - low)  # the expected gain is 0
    [lost], [won] = after_round([capital], [bet], low), after_round([capital], [bet], high)
    assert (1 - chance_of_high) * lost + chance_of_high * won == pytest.approx(capital)


@given(pairs=st.lists(st.tuples(SECONDS, SECONDS), max_size=80))
def test_the_bypass_bets_as_it_always_did(pairs: list[tuple[float, float]]) -> None:
    comparison = Comparison()
    capital, others = [1.0] * 4, list[float]()
    for this_s, other_s in pairs:
        comparison.add(this_s, other_s)
        if len(others) >= 5:
            x = max(-1.0, min(1.0, (this_s - other_s) / (2 * sum(others) / len(others))))
            capital = [has * (1 + bet * x) for has, bet in zip(capital, (0.1, 0.2, 0.4, 0.8))]
        others.append(other_s)
        assert list(comparison.capital) == pytest.approx(capital)  # sum() rounds differently from Python 3.12 on
        assert comparison.rejected == (sum(capital) / 4 >= 100)
    assert BYPASS_BETS == (0.1, 0.2, 0.4, 0.8)


@given(quiet=st.integers(0, 250), losses=st.lists(LOSSES, max_size=40), tolerance=st.floats(0.001, 0.5))
def test_the_monitor_bets_on_single_contents_as_it_always_did(
        quiet: int, losses: list[float], tolerance: float) -> None:
    monitored = Monitored(Risk.CONFIDENCE_GAP, tolerance, 0.05)
    evidence, capital = Evidence(), [0.0] * 5
    for number, sample in enumerate(samples_of([0.0] * quiet + losses)):
        loss, evidence = sample.loss, evidence.after(sample, monitored)
        hundreds, rest = divmod(number, 100)
        stake = 0.0 if rest else 1 / ((hundreds + 1) * (hundreds + 2))
        capital = [(has + stake) * (1 + bet / tolerance * (loss - tolerance))
                   for has, bet in zip(capital, (0.02, 0.05, 0.1, 0.2, 0.4))]
        assert list(evidence.contents.stakes) == capital
        assert evidence.contents.wealth(100) == sum(capital) / 5 + 1 / (math.ceil((number + 1) / 100) + 1)
    assert MONITOR_BETS == (0.02, 0.05, 0.1, 0.2, 0.4)


@given(losses=st.lists(LOSSES, max_size=300), tolerance=st.floats(0.001, 0.9), delta=st.floats(0.001, 0.5))
def test_the_certificate_bets_as_it_always_did(losses: list[float], tolerance: float, delta: float) -> None:
    n = len(losses)
    values = np.array(losses, dtype=np.float64)
    mean = (0.5 + np.cumsum(values)) / (np.arange(n) + 2)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (np.arange(n) + 2)
    log_capital, total = [0.0], 0.0
    for loss, before in zip(losses, [0.25, *variance.tolist()]):
        stake = min(np.sqrt(2 * math.log(1 / delta) / (n * before)), 0.95 / (1 - tolerance))
        total += np.log1p(np.array([-stake * (loss - tolerance)]))[0]
        log_capital.append(total)
    expected = min(1.0, math.exp(-max(log_capital)))
    assert betting_p_value(values, tolerance, delta) == pytest.approx(expected, rel=1e-12)


@given(gains=st.lists(st.floats(-0.9, 2), min_size=1, max_size=50), bet=st.floats(0, 1))
def test_the_p_value_is_the_least_delta_that_would_have_rejected(gains: list[float], bet: float) -> None:
    capital, largest = (1.0,), 1.0
    for gain in gains:
        capital = after_round(capital, (bet,), gain)
        largest = max(largest, wealth(capital))
    p = p_value(math.log(largest))
    assert p == pytest.approx(1 / largest)
    assert rejects(largest, p * 1.001) and not rejects(largest, p * 0.999)


def test_without_a_round_nothing_is_known() -> None:
    assert betting_p_value(np.array([]), 0.02, 0.05) == 1.0
