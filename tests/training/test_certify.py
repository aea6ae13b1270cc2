"""The guarantee is compared with exact sums, and with the true risk in simulations."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from early_exit.handler.errors import RecordError, TooFewRecordsError
from early_exit.handler.exits.risk import Risk
from early_exit.training.options import TrainingOptions
from early_exit.training.planning.choose import choose
from early_exit.training.selection.certify import (
    betting_p_value,
    most_failures,
    p_value,
    records_needed,
    risk_p_value,
    walk,
)
from early_exit.training.selection.evidence import Evidence, blocks_needed
from tests.support.predictions import made_predictions


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
    assert walk([0.0, 0.01, 0.05, 0.051, 0.0], 0.05) == 2  # .051 ends the walk, although 0 follows


def test_a_path_that_never_fails_is_deployed_to_its_end() -> None:
    assert walk([0.0, 0.0, 0.0], 0.05) == 2


def test_too_few_records_say_how_many_are_needed() -> None:
    with pytest.raises(TooFewRecordsError, match=r"at least 149 .* collect about 596 records in all") as refused:
        Evidence.of_independent(100).require_enough(Risk.DISAGREEMENT, 0.02, 0.05, 0.3)
    assert refused.value.needed == 596
    Evidence.of_independent(149).require_enough(Risk.DISAGREEMENT, 0.02, 0.05, 0.3)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), largest=st.sampled_from([1.0, 4.0, 12.0]),
       tolerance=st.floats(0.01, 0.2), risk=st.sampled_from(list(Risk)))
def test_too_few_blocks_are_refused_and_as_many_as_the_message_asks_for_are_not(
        sizes: list[int], largest: float, tolerance: float, risk: Risk) -> None:
    """Small blocks count little beside large ones, so more blocks are needed than if all had the same size."""
    needed = blocks_needed(risk, torch.tensor(sizes), largest, tolerance, 0.05)

    def evidence(n: int) -> Evidence:
        block = torch.arange(n).repeat_interleave(torch.tensor((sizes * n)[:n]))
        return Evidence(block, torch.arange(len(block)), torch.ones(len(block), dtype=torch.bool), (largest, largest))

    evidence(needed).require_enough(risk, tolerance, 0.05, 0.3)
    if needed > 1:
        with pytest.raises(RecordError, match=r"needs at least (\d+) ") as refused:
            evidence(needed - 1).require_enough(risk, tolerance, 0.05, 0.3)
        asked = int(re.findall(r"at least (\d+)", str(refused.value))[0])
        assert needed <= asked <= needed + len(sizes), "the sizes begin anew after those that were found"


def test_a_plan_that_cannot_be_certified_even_without_exits_says_why() -> None:
    predictions = made_predictions(400)
    of_engine = (torch.arange(400) % 10 == 0).float()
    candidates = replace(predictions.certify.candidates, full_losses=of_engine)
    predictions = replace(predictions, certify=replace(predictions.certify, candidates=candidates))
    with pytest.raises(RecordError, match=r"400 records in 400 blocks cannot certify 2.00% .* loses 10.00% with the"):
        choose(predictions, TrainingOptions(tolerance=0.02))


def test_the_certificate_holds_as_often_as_it_says() -> None:
    """On paths whose true risk grows from 0 to 6 %, the deployed step may exceed 2 % in at most 5 % of the runs."""
    generator = torch.Generator().manual_seed(0)
    true_risks = torch.linspace(0, 0.06, 60)
    n, tolerance, delta, n_runs = 1000, 0.02, 0.05, 2000
    broken = 0
    for _ in range(n_runs):
        # For each record, one uniform draw decides at which step its answer starts to differ.
        starts_to_differ = torch.rand(n, generator=generator)
        p_values = [p_value(int((starts_to_differ < risk).sum()), n, tolerance) for risk in true_risks]
        broken += bool(true_risks[walk(p_values, delta)] > tolerance)
    assert broken / n_runs <= delta + 3 * math.sqrt(delta * (1 - delta) / n_runs)


@pytest.mark.parametrize(("values", "chances"), [((0.0, 1.0), (0.98, 0.02)), ((0.0, 0.1, 0.5), (0.9, 0.05, 0.03)),
                                                 ((0.0, 0.5, 1.0), (0.02, 0.92, 0.06))])
def test_a_bet_against_a_true_hypothesis_seldom_wins(values: tuple[float, ...], chances: tuple[float, ...]) -> None:
    """If the mean is exactly T, p <= delta has a probability of at most delta."""
    generator = np.random.default_rng(0)
    chances = tuple(np.array(chances) / sum(chances))
    mean = float(np.dot(values, chances))
    n_runs, delta = 2000, 0.05
    won = sum(betting_p_value(generator.choice(values, 600, p=chances), mean, delta) <= delta for _ in range(n_runs))
    assert won / n_runs <= delta + 3 * math.sqrt(delta * (1 - delta) / n_runs)


def test_a_bet_against_a_false_hypothesis_wins() -> None:
    generator = np.random.default_rng(0)
    small = generator.choice([0.0, 0.2], 1500, p=[0.95, 0.05])  # the mean is 1 %, made of small losses
    assert betting_p_value(small, 0.02, 0.05) < 0.001


def test_the_accuracy_risk_counts_answers_that_only_the_exit_gets_right() -> None:
    answer = torch.tensor([[0], [1], [2], [2]])
    backbone, labels = torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 2, 2])
    losses = Risk.ACCURACY.losses(answer, backbone, torch.zeros(4, 3), labels)
    assert losses.flatten().tolist() == [0.0, 1.0, 0.0, -1.0]
    even = torch.tensor([1.0, -1.0, 0.0, 0.0] * 300)  # gains and losses cancel out
    assert risk_p_value(Risk.ACCURACY, even, 0.1, 0.05) < 0.05 < risk_p_value(Risk.DISAGREEMENT, even.abs(), 0.1, 0.05)


def test_the_confidence_gap_is_what_the_backbone_thinks_of_the_answer() -> None:
    log_probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]).log()
    losses = Risk.CONFIDENCE_GAP.losses(torch.tensor([[1], [0]]), torch.tensor([0, 0]), log_probabilities)
    assert losses.flatten().tolist() == pytest.approx([0.5, 0.0])


def test_the_accuracy_risk_needs_labels() -> None:
    with pytest.raises(RecordError, match="labels"):
        Risk.ACCURACY.losses(torch.zeros(1, 1).long(), torch.zeros(1).long(), torch.zeros(1, 2))
