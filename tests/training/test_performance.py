"""The effect of exits is compared with counts made record by record; predictions are read as they were written."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from early_exit.handler.exits.policy import NEVER
from early_exit.training.planning.predictions import HeadPredictions, PartPredictions
from early_exit.training.report.performance import categorize, curve, exit_performances, setting
from early_exit.training.selection.simulation import OperatingPoint
from tests.support.predictions import made_predictions

POINT = OperatingPoint((0, 2), (0.9, 0.6))


def leaving(predictions: PartPredictions, point: OperatingPoint, record: int) -> int:
    """Return the position of the exit that a record takes, or -1, by Algorithm 1."""
    for position, (layer, threshold) in enumerate(zip(point.layers, point.thresholds)):
        if predictions.candidates.confidence[record, layer] >= threshold:
            return position
    return -1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(-1, 2)), max_size=30))
def test_every_labelled_answer_is_in_exactly_one_category(rows: list[tuple[int, int, int]]) -> None:
    measured = categorize(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T)
    known = [row for row in rows if row[2] >= 0]
    assert measured.total == len(known)
    assert astuple(measured) == (
        sum(c == b == truth for c, b, truth in known), sum(c == b != truth for c, b, truth in known),
        sum(b == truth != c for c, b, truth in known), sum(c == truth != b for c, b, truth in known),
        sum(c != b and truth not in (b, c) for c, b, truth in known))


@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_exits_are_worth_what_counting_their_records_says(labelled: float) -> None:
    predictions = made_predictions(labelled=labelled).certify
    taken = [leaving(predictions, POINT, record) for record in range(len(predictions))]
    n_known = int((predictions.labels >= 0).sum())
    for position, (_, together) in enumerate(exit_performances(POINT, predictions)):
        layer = POINT.layers[position]
        here = [record for record, at in enumerate(taken) if at == position]
        agree = [record for record in here if predictions.answers[record, layer] == predictions.teacher[record]]
        assert together.hit_rate == pytest.approx(len(here) / len(predictions))
        assert together.agreement == pytest.approx(len(agree) / len(here))
        assert together.bound == pytest.approx(together.hit_rate * (1 - together.agreement))
        right = [record for record in here if predictions.answers[record, layer] == predictions.labels[record]]
        before = [record for record in here if predictions.teacher[record] == predictions.labels[record]]
        if n_known:
            assert together.effect == pytest.approx((len(right) - len(before)) / n_known)
            assert together.categories is not None
            assert together.categories.total == sum(predictions.labels[record] >= 0 for record in here)
        else:
            assert together.effect is None and together.accuracy is None and together.categories is None


def test_accuracy_never_falls_by_more_than_the_bound() -> None:
    """Each exit obeys Equation 3 of the paper, and the effects of all exits add up to the change in accuracy."""
    for seed in range(20):
        predictions = made_predictions(seed=seed).certify
        whole = setting(POINT, predictions, predictions.candidates.costs)
        assert whole.accuracy is not None
        effects = [together.effect for _, together in exit_performances(POINT, predictions)]
        bounds = [together.bound for _, together in exit_performances(POINT, predictions)]
        assert all(-effect <= bound + 1e-12 for effect, bound in zip(effects, bounds) if effect is not None)
        assert sum(effects) == pytest.approx(whole.accuracy.served - whole.accuracy.backbone)  # type: ignore[arg-type]
        assert sum(bounds) == pytest.approx(whole.disagreement)


def test_an_exit_that_nobody_passes_before_does_alone_what_it_does_in_the_plan() -> None:
    predictions = made_predictions().certify
    (alone, together), _ = exit_performances(POINT, predictions)
    assert alone == together


def test_a_higher_threshold_never_lets_more_leave() -> None:
    predictions = made_predictions(labelled=0.5).certify
    measured = curve("layer1", 1, predictions)
    assert measured.hit_rate[0] == 1
    assert all(later <= earlier for earlier, later in zip(measured.hit_rate, measured.hit_rate[1:]))
    assert measured.agreement[0] == pytest.approx(predictions.candidates.agrees[:, 1].double().mean().item())
    assert [rate == 0 for rate in measured.hit_rate] == [agree is None for agree in measured.agreement]


def test_without_exits_nothing_changes() -> None:
    predictions = made_predictions().certify
    for point in (OperatingPoint((), ()), OperatingPoint((0, 1), (NEVER, NEVER))):
        measured = setting(point, predictions, predictions.candidates.costs)
        assert measured.disagreement == measured.loss == 0
        assert measured.accuracy is not None and measured.accuracy.served == measured.accuracy.backbone


def test_predictions_come_back_from_their_file(tmp_path: Path) -> None:
    predictions = made_predictions(labelled=0.5)
    predictions.save(tmp_path / "predictions.safetensors")
    again = HeadPredictions.load(tmp_path / "predictions.safetensors")
    assert (again.layers, again.policies) == (predictions.layers, predictions.policies)
    for before, after in ((predictions.tune, again.tune), (predictions.certify, again.certify)):
        for first, second in zip(_tensors(before), _tensors(after), strict=True):
            assert first.dtype == second.dtype and torch.equal(first, second)
        costs, read = before.candidates.costs, after.candidates.costs
        assert (costs.measure, costs.batch_size) == (read.measure, read.batch_size)
        assert (costs.stages == read.stages).all() and (costs.exits == read.exits).all()


def _tensors(part: PartPredictions) -> list[Tensor]:
    return [value for owner in (part, part.candidates) for value in vars(owner).values() if isinstance(value, Tensor)]
