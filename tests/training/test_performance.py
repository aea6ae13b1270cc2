"""What exits are worth, against counts made record by record; and that judgements survive their file."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.training.data.dataset import Part
from early_exit.training.planning.predictions import HeadPredictions, PartPredictions
from early_exit.training.report.performance import categorize, curve, exit_performances, setting
from early_exit.training.selection.thresholds import NEVER, OperatingPoint
from tests.support.judged import made_judged

CHOICE = OperatingPoint((0, 2), (0.9, 0.6))


def leaving(said: PartPredictions, choice: OperatingPoint, record: int) -> int:
    """Return the position of the exit that a record takes, or -1, by Algorithm 1."""
    for position, (layer, threshold) in enumerate(zip(choice.layers, choice.thresholds)):
        if said.candidates.confidence[record, layer] >= threshold:
            return position
    return -1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(-1, 2)), max_size=30))
@settings(deadline=None)
def test_every_labelled_answer_is_in_exactly_one_category(rows: list[tuple[int, int, int]]) -> None:
    found = categorize(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T)
    known = [row for row in rows if row[2] >= 0]
    assert found.total == len(known)
    assert astuple(found) == (
        sum(c == b == truth for c, b, truth in known), sum(c == b != truth for c, b, truth in known),
        sum(b == truth != c for c, b, truth in known), sum(c == truth != b for c, b, truth in known),
        sum(c != b and truth not in (b, c) for c, b, truth in known))


@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_exits_are_worth_what_counting_their_records_says(labelled: float) -> None:
    said = made_judged(labelled=labelled).parts[Part.CERTIFY]
    taken = [leaving(said, CHOICE, record) for record in range(len(said))]
    n_known = int((said.labels >= 0).sum())
    for position, (_, together) in enumerate(exit_performances(CHOICE, said)):
        layer = CHOICE.layers[position]
        here = [record for record, at in enumerate(taken) if at == position]
        agree = [record for record in here if said.answers[record, layer] == said.teacher[record]]
        assert together.hit_rate == pytest.approx(len(here) / len(said))
        assert together.agreement == pytest.approx(len(agree) / len(here))
        assert together.bound == pytest.approx(together.hit_rate * (1 - together.agreement))
        right = [record for record in here if said.answers[record, layer] == said.labels[record]]
        before = [record for record in here if said.teacher[record] == said.labels[record]]
        if n_known:
            assert together.effect == pytest.approx((len(right) - len(before)) / n_known)
            assert together.categories is not None
            assert together.categories.total == sum(said.labels[record] >= 0 for record in here)
        else:
            assert together.effect is None and together.accuracy is None and together.categories is None


def test_accuracy_never_falls_by_more_than_the_bound() -> None:
    """Equation 3 of the paper, and that the exits' effects add up to the change of the whole."""
    for seed in range(20):
        said = made_judged(seed=seed).parts[Part.CERTIFY]
        whole = setting(CHOICE, said, said.candidates.costs)
        assert whole.accuracy is not None
        effects = [together.effect for _, together in exit_performances(CHOICE, said)]
        bounds = [together.bound for _, together in exit_performances(CHOICE, said)]
        assert all(-effect <= bound + 1e-12 for effect, bound in zip(effects, bounds) if effect is not None)
        assert sum(effects) == pytest.approx(whole.accuracy.served - whole.accuracy.backbone)  # type: ignore[arg-type]
        assert sum(bounds) == pytest.approx(whole.disagreement)


def test_an_exit_that_nobody_passes_before_does_alone_what_it_does_in_the_plan() -> None:
    said = made_judged().parts[Part.CERTIFY]
    (alone, together), _ = exit_performances(CHOICE, said)
    assert alone == together


def test_a_higher_threshold_never_lets_more_leave() -> None:
    said = made_judged(labelled=0.5).parts[Part.CERTIFY]
    found = curve("layer1", 1, said)
    assert found.hit_rate[0] == 1
    assert all(later <= earlier for earlier, later in zip(found.hit_rate, found.hit_rate[1:]))
    assert found.agreement[0] == pytest.approx(said.candidates.agrees[:, 1].double().mean().item())
    assert [rate == 0 for rate in found.hit_rate] == [agree is None for agree in found.agreement]


def test_without_exits_nothing_changes() -> None:
    said = made_judged().parts[Part.CERTIFY]
    for choice in (OperatingPoint((), ()), OperatingPoint((0, 1), (NEVER, NEVER))):
        found = setting(choice, said, said.candidates.costs)
        assert found.disagreement == found.loss == 0
        assert found.accuracy is not None and found.accuracy.served == found.accuracy.backbone


def test_judgements_come_back_from_their_file(tmp_path: Path) -> None:
    judged = made_judged(labelled=0.5)
    judged.save(tmp_path / "judged.safetensors")
    again = HeadPredictions.load(tmp_path / "judged.safetensors")
    assert (again.layers, again.temperatures) == (judged.layers, judged.temperatures)
    for part, said in judged.parts.items():
        read = again.parts[part]
        for first, second in zip((said.answers, said.teacher, said.labels, said.candidates.confidence,
                                  said.candidates.agrees, said.candidates.losses),
                                 (read.answers, read.teacher, read.labels, read.candidates.confidence,
                                  read.candidates.agrees, read.candidates.losses)):
            assert first.dtype == second.dtype and torch.equal(first, second)
        before, after = said.candidates.costs, read.candidates.costs
        assert (before.measure, before.batch_size) == (after.measure, after.batch_size)
        assert (before.stages == after.stages).all() and (before.exits == after.exits).all()
