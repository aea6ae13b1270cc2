"""A small part of the benchmark `dependence`, run with fewer images and repetitions."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from tests.benchmarks import dependence
from tests.benchmarks.dependence import Subject, summary
from tests.benchmarks.frames import Bank, handwriting
from tests.benchmarks.streams import STREAMS
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.toy_size import Run

N = 10


@pytest.fixture(scope="module")
def bank(digits_backbone: DigitsResNet, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return handwriting(tmp_path_factory.mktemp("bank"), digits_backbone, n_training=300, n_others=500, n_frames=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes of 20", "harder scenes last longer"])
def test_plans_of_scenes_are_true_raise_no_false_alarm_and_save_half_of_what_single_images_would(
        bank: Bank, name: str) -> None:
    subject = Subject.train(bank, STREAMS[name])
    found = summary(STREAMS[name], [subject.repetition(seed) for seed in range(1, N + 1)])
    at_most = binom.ppf(0.99, N, 0.05) / N
    assert found["broken_share"] <= at_most and found["false_alarm_share"] <= at_most
    assert found["refused_share"] <= 0.2 and found["saving"] >= found["saving_of_independent"] / 2


@pytest.mark.slow
def test_the_command_has_a_row_for_each_stream(run: Run, bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependence, "_BANKS", {"digits": lambda folder: bank})
    figures = run(dependence, "--repetitions", 2, "--streams", "independent digits", "unequal scenes")
    assert [row["name"] for row in figures["streams"]] == ["independent digits", "unequal scenes"]
    assert all(row["repetitions"] == 2 and 0 <= row["saving"] < 1 for row in figures["streams"])
    assert 0.5 < figures["iid_cost_ratio"] < 2 and 0 < figures["median_samples_to_alarm"] < 4000
