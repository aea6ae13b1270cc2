"""Thresholds by budget and by certificate, against definitions applied record by record."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.training.costs.cost import Costs
from early_exit.training.data.dataset import Part
from early_exit.training.options import TrainingOptions
from early_exit.training.planning.choose import settings as settings_to_certify
from early_exit.training.selection.certify import most_failures
from early_exit.training.selection.thresholds import (
    Candidates,
    OperatingPoint,
    batch_costs,
    budget_threshold,
    certified_path,
    equal_point,
    mean_cost,
    outcome,
    paper_point,
    safer_settings,
)
from tests.support.judged import made_judged


def simulated(n_records: int, seed: int = 0) -> Candidates:
    """Three heads, each better than the one before; confident when they are right."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(n_records, 1, generator=generator)
    skill = torch.tensor([0.5, 0.7, 0.9])
    margin = skill - difficulty + 0.15 * torch.randn(n_records, 3, generator=generator)
    confidence = torch.sigmoid(6 * margin)
    agrees = torch.rand(n_records, 3, generator=generator) < 0.3 + 0.7 * confidence
    costs = Costs("flops", 1, np.array([[0, 0.2], [0, 0.3], [0, 0.3], [0, 0.2]]), np.array([[0, 0.01]] * 3))
    return Candidates(confidence, agrees, (~agrees).float(), torch.ones(n_records, dtype=torch.bool),
                      torch.zeros(n_records), costs)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.1))
def test_what_an_engine_changes_counts_for_those_that_leave_nowhere(seed: int, share: float) -> None:
    exact = simulated(400, seed)
    differs = torch.rand(400, generator=torch.Generator().manual_seed(seed)) < share
    lossy = replace(exact, full_agrees=~differs, full_losses=differs.float())
    assert outcome(OperatingPoint((), ()), lossy).losses.sum() == differs.sum()
    for choice in certified_path(lossy, 0.1, 0.05, 400)[::10]:
        found, without = outcome(choice, lossy), outcome(choice, exact)
        assert torch.equal(found.exit, without.exit)
        left = found.exit >= 0
        assert torch.equal(found.losses[left], without.losses[left])
        assert torch.equal(found.differs[~left], differs[~left])


@settings(deadline=None, max_examples=150)
@given(data=st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40), budget=st.floats(0, 1))
def test_the_budget_threshold_is_the_smallest_that_keeps_the_budget(
        data: list[tuple[int, bool]], budget: float) -> None:
    confidence = torch.tensor([level / 20 for level, _ in data])
    agrees = torch.tensor([agree for _, agree in data])

    def spent(threshold: float) -> float:
        """Hit rate x (1 - agreement) of the hits."""
        hits = confidence >= threshold
        if not hits.any():
            return 0.0
        return hits.double().mean().item() * (1 - agrees[hits].double().mean().item())

    threshold = budget_threshold(confidence, agrees, budget)
    assert spent(threshold) <= budget + 1e-9
    lower = [level for level in confidence.tolist() if level < threshold]
    if lower:
        assert spent(max(lower)) > budget - 1e-9


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), low=st.floats(0.3, 1.0), high=st.floats(0.3, 1.0))
def test_the_outcome_is_algorithm_1_record_by_record(seed: int, low: float, high: float) -> None:
    records = simulated(50, seed)
    choice = OperatingPoint((0, 2), (low, high))
    found = outcome(choice, records)
    total, until = 0.0, (0.2, 0.5, 0.8)
    for record in range(50):
        spent, taken, differs = 0.0, -1, False
        for position, (layer, threshold) in enumerate(zip(choice.layers, choice.thresholds)):
            spent += 0.01
            if records.confidence[record, layer] >= threshold:
                taken, differs = position, not records.agrees[record, layer]
                spent += until[layer]
                break
        else:
            spent += 1.0
        assert found.exit[record] == taken
        assert bool(found.differs[record]) == differs
        assert found.losses[record] == differs
        total += spent
    assert mean_cost(choice, found.exit, records.costs) == pytest.approx(total / 50)


def test_the_path_starts_where_nobody_exits_and_grows_more_aggressive() -> None:
    tune = simulated(1000)
    path = certified_path(tune, 0.05, 0.05, 1500)
    exited = [int((outcome(choice, tune).exit >= 0).sum()) for choice in path]
    assert exited[0] == 0
    assert exited == sorted(exited)
    assert len({choice.layers for choice in path}) == 1 and path[0].layers


def test_risk_buys_time_at_one_rate_at_all_exits_of_a_setting() -> None:
    tune = simulated(1000)
    until = tune.costs.stages.cumsum(axis=0)[:, 1]
    for choice in certified_path(tune, 0.05, 0.05, 1500)[1:]:
        rates = [(1 - threshold) / (1 - until[layer]) for layer, threshold in zip(choice.layers, choice.thresholds)
                 if threshold > 0]
        assert max(rates, default=0) == pytest.approx(min(rates, default=0), abs=1e-5)


def test_luck_on_the_tune_part_does_not_choose_exits() -> None:
    judged, options = made_judged(400), TrainingOptions(tolerance=0.1)
    path = settings_to_certify(judged, options)
    assert path[-1].layers
    said = judged.parts[Part.TUNE]
    other = replace(said, candidates=replace(said.candidates, agrees=~said.candidates.agrees,
                                             losses=1 - said.candidates.losses))
    assert settings_to_certify(replace(judged, parts={**judged.parts, Part.TUNE: other}), options) == path


def test_the_chosen_subset_can_be_certified_where_it_was_chosen() -> None:
    tune = simulated(1000)
    path = certified_path(tune, 0.05, 0.05, 1500)
    allowed = 1000 * most_failures(1500, 0.05, 0.05) / 1500
    assert any(0 < int(outcome(choice, tune).differs.sum()) <= allowed for choice in path)


def test_each_safer_setting_was_certified_before_and_loses_at_most_half_as_much() -> None:
    tune = simulated(2000)
    path = certified_path(tune, 0.1, 0.05, 2000)
    deployed = len(path) - 30
    settings_back = safer_settings(path, deployed, tune)
    before = [choice.thresholds for choice in path[:deployed]]
    assert 1 <= len(settings_back) <= 8
    assert set(settings_back) <= set(before)
    lost = [outcome(OperatingPoint(path[0].layers, thresholds), tune).losses.sum().item()
            for thresholds in (path[deployed].thresholds, *settings_back)]
    assert all(after <= one / 2 for one, after in pairwise(lost))
    assert safer_settings(path, 0, tune) == ()


def test_the_papers_budget_halves_with_every_exit() -> None:
    tune = simulated(2000)
    choice = paper_point(tune, 0.08)
    assert choice.layers
    for position, (layer, threshold) in enumerate(zip(choice.layers, choice.thresholds), start=1):
        hits = tune.confidence[:, layer] >= threshold
        assert (hits & ~tune.agrees[:, layer]).double().mean() <= 0.08 / 2**position


def test_the_equal_budget_is_divided_by_the_number_of_exits() -> None:
    tune = simulated(2000)
    choice = equal_point(tune, 0.08)
    assert choice.layers
    for layer, threshold in zip(choice.layers, choice.thresholds):
        hits = tune.confidence[:, layer] >= threshold
        assert (hits & ~tune.agrees[:, layer]).double().mean() <= 0.08 / len(choice.layers)


def test_the_expected_cost_of_a_batch_is_the_mean_over_drawn_batches() -> None:
    records = simulated(3000)
    choice = OperatingPoint((0, 1, 2), (0.8, 0.8, 0.8))
    stages = np.array([[0, 0.05, 0.1, 0.12, 0.2], [0, 0.2, 0.21, 0.22, 0.3],
                       [0, 0.1, 0.1, 0.1, 0.2], [0, 0.1, 0.2, 0.3, 0.3]])
    costs = Costs("seconds", 4, stages, np.array([[0, 0.02, 0.03, 0.03, 0.04]] * 3))
    taken = outcome(choice, records).exit
    drawn = torch.cat([batch_costs(choice, taken, costs, seed=seed) for seed in range(20)])
    assert mean_cost(choice, taken, costs) == pytest.approx(drawn.mean().item(), rel=0.01)
