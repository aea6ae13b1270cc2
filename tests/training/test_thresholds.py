"""Thresholds by budget and by certificate are compared with definitions applied record by record."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.handler.exits.policy import NEVER
from early_exit.training.costs.cost import Costs
from early_exit.training.options import TrainingOptions
from early_exit.training.planning.choose import path_to_certify
from early_exit.training.selection.certify import most_failures
from early_exit.training.selection.simulation import Candidates, OperatingPoint, batch_costs, mean_cost, outcome
from early_exit.training.selection.thresholds import (
    budget_threshold,
    certified_path,
    equal_point,
    least_agreeing,
    paper_point,
    safer_settings,
)
from tests.support.predictions import made_predictions


def simulated(n_records: int, seed: int = 0) -> Candidates:
    """Return candidates with three heads, each better than the previous one and more confident when it is right."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(n_records, 1, generator=generator)
    skill = torch.tensor([0.5, 0.7, 0.9])
    margin = skill - difficulty + 0.15 * torch.randn(n_records, 3, generator=generator)
    confidence = torch.sigmoid(6 * margin)
    agrees = torch.rand(n_records, 3, generator=generator) < 0.3 + 0.7 * confidence
    costs = Costs("flops", 1, np.array([[0, 0.2], [0, 0.3], [0, 0.3], [0, 0.2]]), np.array([[0, 0.01]] * 3))
    return Candidates(confidence, 1 - confidence, agrees, (~agrees).float(), torch.ones(n_records, dtype=torch.bool),
                      torch.zeros(n_records), costs)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.1))
def test_what_an_engine_changes_counts_for_those_that_leave_nowhere(seed: int, share: float) -> None:
    exact = simulated(400, seed)
    differs = torch.rand(400, generator=torch.Generator().manual_seed(seed)) < share
    lossy = replace(exact, full_agrees=~differs, full_losses=differs.float())
    assert outcome(OperatingPoint((), ()), lossy).losses.sum() == differs.sum()
    for point in certified_path(lossy, 0.1, 0.05, 400)[::10]:
        with_engine, without = outcome(point, lossy), outcome(point, exact)
        assert torch.equal(with_engine.exit, without.exit)
        left = with_engine.exit >= 0
        assert torch.equal(with_engine.losses[left], without.losses[left])
        assert torch.equal(with_engine.differs[~left], differs[~left])


@settings(max_examples=150)
@given(data=st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40), budget=st.floats(0, 1))
def test_the_budget_threshold_is_the_smallest_that_keeps_the_budget(
        data: list[tuple[int, bool]], budget: float) -> None:
    confidence = torch.tensor([level / 20 for level, _ in data])
    agrees = torch.tensor([agree for _, agree in data])

    def spent(threshold: float) -> float:
        """Return the hit rate times one minus the agreement of the hits."""
        hits = confidence >= threshold
        if not hits.any():
            return 0.0
        return hits.double().mean().item() * (1 - agrees[hits].double().mean().item())

    threshold = budget_threshold(confidence, agrees, budget)
    assert spent(threshold) <= budget + 1e-9
    lower = [level for level in confidence.tolist() if least_agreeing(confidence, agrees) <= level < threshold]
    if lower:
        assert spent(max(lower)) > budget - 1e-9


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), n_contents=st.integers(1, 60), right=st.floats(0, 1), tolerance=st.floats(0.01, 0.5))
def test_no_rule_lets_leave_what_is_less_sure_than_all_that_a_head_was_seen_to_agree_at(
        seed: int, n_contents: int, right: float, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    contents = torch.randint(n_contents, (400,), generator=generator)
    confidence = torch.rand(n_contents, 3, generator=generator)[contents]
    agrees = (torch.rand(n_contents, 3, generator=generator) < right)[contents]
    tune = replace(simulated(400), confidence=confidence, error_chance=1 - confidence, agrees=agrees,
                   losses=(~agrees).float())
    path = certified_path(tune, tolerance, 0.05, 1500)
    points = [*path, paper_point(tune, tolerance), equal_point(tune, tolerance)]
    points += [OperatingPoint(path[0].layers, thresholds) for thresholds in safer_settings(path, len(path) - 1, tune)]
    for point in points:
        for layer, threshold in zip(point.layers, point.thresholds, strict=True):
            agreeing = confidence[agrees[:, layer], layer].tolist()
            # Thresholds on the path are rounded to six decimals.
            assert threshold >= min(agreeing, default=NEVER) - 1e-6


def test_where_a_head_never_agrees_nobody_leaves_at_any_rate() -> None:
    tune = simulated(400)
    wrong = replace(tune, agrees=torch.zeros_like(tune.agrees), losses=torch.ones_like(tune.losses))
    assert not any((outcome(point, wrong).exit >= 0).any() for point in certified_path(wrong, 0.5, 0.05, 1500))
    assert paper_point(wrong, 0.5).layers == equal_point(wrong, 0.5).layers == ()


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), low=st.floats(0.3, 1.0), high=st.floats(0.3, 1.0))
def test_the_outcome_is_algorithm_1_record_by_record(seed: int, low: float, high: float) -> None:
    records = simulated(50, seed)
    point = OperatingPoint((0, 2), (low, high))
    result = outcome(point, records)
    total, until = 0.0, (0.2, 0.5, 0.8)
    for record in range(50):
        spent, taken, differs = 0.0, -1, False
        for position, (layer, threshold) in enumerate(zip(point.layers, point.thresholds)):
            spent += 0.01
            if records.confidence[record, layer] >= threshold:
                taken, differs = position, not records.agrees[record, layer]
                spent += until[layer]
                break
        else:
            spent += 1.0
        assert result.exit[record] == taken
        assert bool(result.differs[record]) == differs
        assert result.losses[record] == differs
        total += spent
    assert mean_cost(point, result.exit, records.costs) == pytest.approx(total / 50)


def test_the_path_starts_where_nobody_exits_and_grows_more_aggressive() -> None:
    tune = simulated(1000)
    path = certified_path(tune, 0.05, 0.05, 1500)
    exited = [int((outcome(point, tune).exit >= 0).sum()) for point in path]
    assert exited[0] == 0
    assert exited == sorted(exited)
    assert len({point.layers for point in path}) == 1 and path[0].layers


def test_risk_buys_time_at_one_rate_at_all_exits_of_a_setting() -> None:
    tune = simulated(1000)
    until = tune.costs.stages.cumsum(axis=0)[:, 1]
    least = [least_agreeing(tune.confidence[:, layer], tune.agrees[:, layer]) for layer in range(3)]
    n_compared = 0
    for point in certified_path(tune, 0.05, 0.05, 1500)[1:]:
        rates = [(1 - threshold) / (1 - until[layer]) for layer, threshold in zip(point.layers, point.thresholds)
                 if threshold > least[layer]]
        assert max(rates, default=0) == pytest.approx(min(rates, default=0), abs=1e-5)
        n_compared += len(rates) > 1
    assert n_compared > 10


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), power=st.sampled_from([0.5, 3.0]))
def test_who_leaves_depends_on_the_chance_of_an_error_and_not_on_what_scale_the_confidence_has(
        seed: int, power: float) -> None:
    tune = simulated(500, seed)
    path = certified_path(tune, 0.05, 0.05, 1500)
    other = replace(tune, confidence=tune.confidence**power)
    other_path = certified_path(other, 0.05, 0.05, 1500)
    assert [point.layers for point in other_path] == [point.layers for point in path]
    for point, same in zip(path, other_path):
        assert (outcome(point, tune).exit == outcome(same, other).exit).double().mean() >= 0.99
    for before, after in pairwise(point.thresholds for point in other_path):
        assert all(later <= earlier for earlier, later in zip(before, after))


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), noise=st.floats(0, 0.5))
def test_at_each_rate_those_leave_who_save_most_beyond_what_they_risk(seed: int, noise: float) -> None:
    exact = simulated(300, seed)
    drawn = torch.rand(300, 3, generator=torch.Generator().manual_seed(seed))
    tune = replace(exact, confidence=((1 - noise) * exact.confidence**3 + noise * drawn).mul(50).round() / 50)
    path = certified_path(tune, 0.2, 0.05, 1500)
    for rate, point in zip(torch.logspace(-4, 1, 157, dtype=torch.float64).tolist()[::13], path[1::13], strict=True):
        for layer, threshold in zip(point.layers, point.thresholds):
            gains = rate * tune.costs.saved[layer] - tune.error_chance[:, layer].double()
            least = least_agreeing(tune.confidence[:, layer], tune.agrees[:, layer])
            best = max(gains[tune.confidence[:, layer] >= level].sum().item()
                       for level in (NEVER, *(step / 50 for step in range(52))) if level > least - 1e-3)
            assert gains[tune.confidence[:, layer] >= threshold].sum().item() >= best - 1e-3


def test_luck_on_the_tune_part_does_not_choose_exits() -> None:
    predictions, options = made_predictions(400), TrainingOptions(tolerance=0.1)
    path = path_to_certify(predictions, options)
    assert path[-1].layers
    before = predictions.tune.candidates
    least = torch.tensor([least_agreeing(before.confidence[:, layer], before.agrees[:, layer]) for layer in range(3)])
    agrees = before.agrees ^ (before.confidence > least)  # the least thresholds stay the same
    other = replace(predictions.tune, candidates=replace(before, agrees=agrees, losses=(~agrees).float()))
    assert path_to_certify(replace(predictions, tune=other), options) == path


def test_the_chosen_subset_can_be_certified_where_it_was_chosen() -> None:
    tune = simulated(1000)
    path = certified_path(tune, 0.05, 0.05, 1500)
    allowed = 1000 * most_failures(1500, 0.05, 0.05) / 1500
    assert any(0 < int(outcome(point, tune).differs.sum()) <= allowed for point in path)


def test_each_safer_setting_was_certified_before_and_loses_at_most_half_as_much() -> None:
    tune = simulated(2000)
    path = certified_path(tune, 0.1, 0.05, 2000)
    deployed = len(path) - 30
    settings_back = safer_settings(path, deployed, tune)
    before = [point.thresholds for point in path[:deployed]]
    assert 1 <= len(settings_back) <= 8
    assert set(settings_back) <= set(before)
    lost = [outcome(OperatingPoint(path[0].layers, thresholds), tune).losses.sum().item()
            for thresholds in (path[deployed].thresholds, *settings_back)]
    assert all(after <= before / 2 for before, after in pairwise(lost))
    assert safer_settings(path, 0, tune) == ()


def test_the_papers_budget_halves_with_every_exit() -> None:
    tune = simulated(2000)
    point = paper_point(tune, 0.08)
    assert point.layers
    for position, (layer, threshold) in enumerate(zip(point.layers, point.thresholds), start=1):
        hits = tune.confidence[:, layer] >= threshold
        assert (hits & ~tune.agrees[:, layer]).double().mean() <= 0.08 / 2**position


def test_the_equal_budget_is_divided_by_the_number_of_exits() -> None:
    tune = simulated(2000)
    point = equal_point(tune, 0.08)
    assert point.layers
    for layer, threshold in zip(point.layers, point.thresholds):
        hits = tune.confidence[:, layer] >= threshold
        assert (hits & ~tune.agrees[:, layer]).double().mean() <= 0.08 / len(point.layers)


def test_the_expected_cost_of_a_batch_is_the_mean_over_drawn_batches() -> None:
    records = simulated(3000)
    point = OperatingPoint((0, 1, 2), (0.8, 0.8, 0.8))
    stages = np.array([[0, 0.05, 0.1, 0.12, 0.2], [0, 0.2, 0.21, 0.22, 0.3],
                       [0, 0.1, 0.1, 0.1, 0.2], [0, 0.1, 0.2, 0.3, 0.3]])
    costs = Costs("seconds", 4, stages, np.array([[0, 0.02, 0.03, 0.03, 0.04]] * 3))
    taken = outcome(point, records).exit
    drawn = torch.cat([batch_costs(point, taken, costs, seed=seed) for seed in range(20)])
    assert mean_cost(point, taken, costs) == pytest.approx(drawn.mean().item(), rel=0.01)
