"""Handlers as people write them: through TorchServe, a client gets the same answers as before, from whichever exit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from early_exit.handler.errors import Unsupported
from tests.benchmarks.habits import HABITS
from tests.support.habits.trial import WITH_EXITS, Trial, try_habits

pytestmark = pytest.mark.slow

SAME = ("own_statuses", "global_model", "image_classifier", "video_frames", "counted", "bert", "faster_rcnn")
"""From `global_model` on, these are handlers that TorchServe's documentation shows: a module-level handler, an image
classifier, frames of a video, custom metrics, a BERT for sequence classification with explanations, and a detector.
`python -m tests.benchmarks.habits` tries the other habits, and early answers."""
REFUSED = {"ensemble": Unsupported.SEVERAL_SCORES}


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Trial]:
    habits = [habit for habit in HABITS if habit.name in (*SAME, *REFUSED)]
    found = try_habits(habits, tmp_path_factory.mktemp("habits") / "tried", ways=(WITH_EXITS,))
    return {trial.habit.name: trial for trial in found}


@pytest.mark.parametrize("name", SAME)
def test_answers_are_those_of_the_original_wherever_they_leave_and_whatever_batch_they_are_in(
        name: str, trials: Mapping[str, Trial]) -> None:
    assert trials[name].same, trials[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_have_exits_is_refused_for_a_reason_that_is_listed(
        name: str, trials: Mapping[str, Trial]) -> None:
    refused = trials[name].refused
    assert refused is not None and refused.reason is REFUSED[name] and trials[name].habit.refusal is REFUSED[name]
