"""The guarantee: against exact sums, and against the truth in simulation."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from early_exit.handler.errors import RecordError
from early_exit.training.certify import most_failures, p_value, records_needed, require_enough, walk


@given(n=st.integers(1, 60), k=st.integers(0, 60), percent=st.integers(1, 99))
def test_the_p_value_is_the_exact_binomial_sum(n: int, k: int, percent: int) -> None:
    t = Fraction(percent, 100)
    exact = sum(math.comb(n, i) * t**i * (1 - t) ** (n - i) for i in range(min(k, n) + 1))
    assert p_value(k, n, percent / 100) == pytest.approx(float(exact), rel=1e-9)


@given(n=st.integers(1, 3000), tolerance=st.floats(0.002, 0.3), delta=st.floats(0.01, 0.3))
def test_most_failures_is_the_last_count_that_certifies(n: int, tolerance: float, delta: float) -> None:
    k = most_failures(n, tolerance, delta)
    assert k < 0 or p_value(k, n, tolerance) <= delta
    assert p_value(k + 1, n, tolerance) > delta


@given(tolerance=st.floats(0.002, 0.3), delta=st.floats(0.01, 0.3))
def test_one_record_fewer_than_needed_certifies_nothing(tolerance: float, delta: float) -> None:
    n = records_needed(tolerance, delta)
    assert most_failures(n, tolerance, delta) >= 0
    assert n == 1 or most_failures(n - 1, tolerance, delta) == -1


def test_the_step_before_the_first_rejected_one_is_deployed() -> None:
    assert walk([0, 3, 12, 40, 0], 1500, 0.02, 0.05) == 2  # 40 of 1500 ends the walk, though 0 comes later


def test_a_path_that_never_fails_is_deployed_to_its_end() -> None:
    assert walk([0, 0, 0], 1500, 0.02, 0.05) == 2


def test_too_few_records_say_how_many_are_needed() -> None:
    with pytest.raises(RecordError, match=r"at least 149 .* collect about 596 records in all"):
        require_enough(100, 0.3, 0.02, 0.05)
    require_enough(149, 0.3, 0.02, 0.05)


def test_the_certificate_holds_as_often_as_it_says() -> None:
    """Walk paths whose true risk grows from 0 to 6 %: the deployed step may exceed 2 % in at most 5 % of runs."""
    generator = torch.Generator().manual_seed(0)
    true_risks = torch.linspace(0, 0.06, 60)
    n, tolerance, delta, n_runs = 1000, 0.02, 0.05, 2000
    broken = 0
    for _ in range(n_runs):
        # One uniform draw per record decides at which step its answer starts to differ.
        starts_to_differ = torch.rand(n, generator=generator)
        failures = [int((starts_to_differ < risk).sum()) for risk in true_risks]
        broken += bool(true_risks[walk(failures, n, tolerance, delta)] > tolerance)
    assert broken / n_runs <= delta + 3 * math.sqrt(delta * (1 - delta) / n_runs)
