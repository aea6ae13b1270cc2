"""When the trial of a new version is over: the monitor must have bet on what it has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.trial import has_passed
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.exits.likeness import Likeness
from early_exit.handler.exits.risk import Risk
from early_exit.handler.monitor.blocks import Sample
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import Capital, Evidence, MonitorState
from tests.archiver.test_triggers import PLAN

ALONE = Monitored(Risk.DISAGREEMENT, 0.02, 0.05)
SCENES = replace(ALONE, likeness=Likeness(torch.zeros(2), torch.eye(2), 0.5, 800.0))
"""Each scene is about 40 samples of 20 requests."""
FAR_FUTURE = 1e9


def watched(samples: Sequence[Sample], monitored: Monitored = ALONE) -> ModelStatus:
    state = MonitorState().after(samples, monitored, last_level=3, now=FAR_FUTURE)
    return ModelStatus("digits", "3.0", ("3.0",), Path("digits-3.0.mar"),
                       cast(BackboneDescription, SimpleNamespace(sha256="ab")), PLAN, "", (), torch.zeros(0), (state,))


def independent(n: int, loss: float = 0.0) -> list[Sample]:
    return [Sample(0, loss, number, float(number)) for number in range(n)]


def frames(n: int, per_scene: int, loss: float = 0.0) -> list[Sample]:
    return [Sample(0, loss, number, float(number), 20.0, (10.0 * (number // per_scene), 0.001 * (number % 2)))
            for number in range(n)]


@pytest.mark.parametrize("trial_samples", [3, 30, 300])
def test_independent_samples_pass_when_there_are_as_many_as_asked_for(trial_samples: int) -> None:
    assert has_passed(watched(independent(trial_samples)), trial_samples)
    assert not has_passed(watched(independent(trial_samples - 1)), trial_samples)


@pytest.mark.parametrize("tolerance", [0.001, 0.02, 0.3])
@pytest.mark.parametrize("per_scene", [1, 7, 40, 300])
def test_a_trial_is_over_as_soon_as_wrong_answers_would_have_raised_an_alarm(tolerance: float, per_scene: int) -> None:
    monitored = replace(SCENES if per_scene > 1 else ALONE, tolerance=tolerance)
    for n in range(1, 8 * per_scene, max(1, per_scene // 7)):
        right, wrong = (watched(frames(n, per_scene, loss), monitored) for loss in (0.0, 1.0))
        assert has_passed(right, 1) == (wrong.first_alarm is not None), n


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=12), hosts=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_no_version_passes_its_trial_if_all_of_its_answers_may_be_wrong(sizes: list[int], hosts: int) -> None:
    scenes = [Sample(0, 1.0, 1000 * scene + number, 1000.0 * scene + number, 20.0, (10.0 * scene, 0.0))
              for scene, size in enumerate(sizes) for number in range(size)]
    right = [replace(sample, loss=0.0) for sample in scenes]
    of_host = [watched(wrong, SCENES) for wrong in (scenes[host::hosts] for host in range(hosts))]
    if not any(status.first_alarm for status in of_host):
        states = tuple(watched(right[host::hosts], SCENES).monitors[0] for host in range(hosts))
        assert not has_passed(replace(of_host[0], monitors=states), 1)


@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_copies_and_a_single_scene_pass_no_trial_because_nothing_was_bet_on(loss: float) -> None:
    copies = watched([Sample(0, loss, 7, float(number)) for number in range(400)])
    scene = watched(frames(400, per_scene=400, loss=loss), SCENES)
    for status in (copies, scene):
        assert status.n_watched == 400 and status.first_alarm is None, "even if all answers are wrong"
        assert not has_passed(status, 300)


def test_a_long_scene_that_has_ended_is_too_little_for_a_trial() -> None:
    status = watched(frames(800, per_scene=600, loss=1.0), SCENES)
    assert status.n_tested >= 300 and status.first_alarm is None
    assert not has_passed(status, 300)


def test_scenes_pass_when_enough_of_them_have_ended() -> None:
    assert has_passed(watched(frames(400, per_scene=40), SCENES), 300)
    assert watched(frames(400, per_scene=40, loss=1.0), SCENES).first_alarm is not None


def test_a_service_with_few_contents_passes_after_rounds_of_bets_on_requests() -> None:
    def alternating(n: int) -> list[Sample]:
        return [Sample(0, 0.0, number % 2, float(number)) for number in range(n)]

    assert not has_passed(watched(alternating(900)), 300)
    assert has_passed(watched(alternating(1100)), 300)


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 3, 4, 5, 8, 9, 16, 17]])
def test_the_number_of_tested_contents_is_at_most_the_true_one_and_more_than_half_of_it(sizes: list[int]) -> None:
    counts = [0] * (math.ceil(math.log2(max(sizes))) + 1)
    for size in sizes:
        counts[(size - 1).bit_length()] += 1
    evidence = Evidence(contents=Capital(len(sizes)), sizes=tuple(counts))
    assert sum(sizes) / 2 < evidence.n_tested <= sum(sizes)


def test_samples_of_a_host_that_has_bet_on_nothing_do_not_add_to_those_of_another() -> None:
    """All answers of the second host are wrong so far, but its scene has not ended."""
    few, scene = watched(independent(150)), watched(frames(300, per_scene=300, loss=1.0), SCENES)
    assert few.n_watched == 150 and scene.n_watched == 300 and scene.first_alarm is None
    both = replace(few, monitors=(*few.monitors, *scene.monitors))
    assert not has_passed(both, 300) and has_passed(both, 150)
