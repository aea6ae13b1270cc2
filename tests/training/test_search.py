"""The search with NNI's tuner finds good heads, and a kill costs at most one trial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from early_exit.handler.exits.head import HeadSpec
from early_exit.training.costs.cost import FlopCost
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.journal import read_journal
from early_exit.training.heads.nni_algorithms import HeadTpe
from early_exit.training.heads.search import Search, best_trial, search_layer
from early_exit.training.heads.space import SearchSpace, default_choice, default_head, spec_of
from early_exit.training.heads.trial import Evaluator, Trial, is_better_than_chance
from early_exit.training.paths import RunPaths
from tests.support.training_set import LAYER, made_training_set

SPACE = SearchSpace(linears=(0, 1), width=(2, 4, 8, 16))
RECIPE = Distillation(epochs=3)


def evaluator(folder: Path, *, target: Callable[[Tensor], Tensor] | None = None) -> Evaluator:
    return Evaluator(LAYER, made_training_set(folder, target), 0.05, RECIPE, FlopCost(100_000), "confidence")


def test_each_trial_leaves_a_line_and_a_head(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    trials = search_layer(evaluator(tmp_path / "training_set"), SPACE, Search(trials=4), run)
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert read_journal(run, LAYER.path) == trials
    assert all(run.trial(LAYER.path, number).exists() for number in range(4))
    best = best_trial(trials)
    assert best is not None and best.objective == min(trial.objective for trial in trials if not trial.stopped)


def test_the_default_head_is_tried_first_where_the_space_has_it(tmp_path: Path) -> None:
    evaluating = evaluator(tmp_path / "training_set")
    first, = search_layer(evaluating, SearchSpace(), Search(trials=1), RunPaths(tmp_path / "run"))
    assert first.head == default_head(evaluating.training_set.recorded)
    assert default_choice(SPACE.choices(LAYER.shape, None)) is None
    assert len(search_layer(evaluating, SPACE, Search(trials=1), RunPaths(tmp_path / "other"))) == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(64, 8, 8), (128,)])
def test_a_tuner_starts_with_the_default_head_and_asks_for_none_twice(shape: tuple[int, ...], seed: int) -> None:
    space = SearchSpace(linears=(0, 1, 2))
    tuner = HeadTpe(seed, startup=4)
    tuner.update_search_space(space.choices(shape, 4))
    asked, heads = [], []
    for number in range(6):
        asked.append(tuner.generate_parameters(number))
        heads.append(spec_of(asked[-1], shape, 4))
        tuner.receive_trial_result(number, {}, float(len(heads[-1].widths)))  # the same few heads are always best
    assert heads[0] == default_head(4)
    resumed = HeadTpe(seed + 1, startup=4)
    resumed.update_search_space(space.choices(shape, 4))
    resumed.import_data([{"parameter": parameters, "value": 1.0} for parameters in asked])
    heads += [spec_of(resumed.generate_parameters(number), shape, 4) for number in range(6)]
    assert len(set(heads)) == 12


def test_no_head_is_tried_twice(tmp_path: Path) -> None:
    trials = search_layer(evaluator(tmp_path / "training_set"), SearchSpace(linears=(1,), width=(2, 4, 8)),
                          Search(trials=10), RunPaths(tmp_path / "run"))
    assert sorted(trial.head.widths for trial in trials) == [(2,), (4,), (8,)]


def test_a_search_goes_on_where_it_was_and_drops_a_line_cut_short(tmp_path: Path) -> None:
    run, evaluating = RunPaths(tmp_path / "run"), evaluator(tmp_path / "training_set")
    first = search_layer(evaluating, SPACE, Search(trials=2), run)
    journal = run.trials(LAYER.path)
    with journal.open("a") as file:
        file.write('{"number": 2, "parame')
    again = search_layer(evaluating, SPACE, Search(trials=4), run)
    assert again[:2] == first and len(again) == 4
    assert [json.loads(line)["number"] for line in journal.read_text().splitlines()] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_killed_search_loses_at_most_one_trial(tmp_path: Path) -> None:
    code = ("from pathlib import Path; from tests.training.test_search import *; "
            f"search_layer(evaluator(Path({str(tmp_path / 'again')!r})), SPACE, Search(trials=50), "
            f"RunPaths(Path({str(tmp_path / 'run')!r})))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    run = RunPaths(tmp_path / "run")
    deadline = time.monotonic() + 60
    while len(read_journal(run, LAYER.path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = read_journal(run, LAYER.path)
    heads = len(list((tmp_path / "run" / "search" / LAYER.path).glob("*.safetensors")))
    assert len(done) >= 3 and heads - len(done) in (0, 1)
    again = search_layer(evaluator(tmp_path / "again2"), SPACE, Search(trials=len(done) + 1), run)
    assert again[:len(done)] == done


def test_a_head_that_says_nothing_is_no_better_than_chance(tmp_path: Path) -> None:
    noise = evaluator(tmp_path / "training_set", target=lambda x: torch.randn(len(x), 3))
    trial, _ = noise.run(0, {"linears": 0}, lambda trial: True)
    assert not trial.better_than_chance
    assert best_trial([trial]) is None


def test_always_naming_the_commonest_class_is_chance() -> None:
    teacher = torch.tensor([0] * 70 + [1] * 30)
    assert not is_better_than_chance(torch.zeros(100).long() == teacher, teacher)
    assert is_better_than_chance(torch.ones(100, dtype=torch.bool), teacher)


def test_a_stopped_trial_is_the_best_only_where_no_finished_one_beats_chance() -> None:
    done = Trial(0, {}, HeadSpec(), 0.9, True, 0.1, (0.9, 0.8, 0.7), 1.0)
    stopped = replace(done, number=1, history=(0.5,))
    assert best_trial([done, stopped]) == done
    assert best_trial([replace(done, better_than_chance=False), stopped]) == stopped
    assert best_trial([replace(stopped, better_than_chance=False)]) is None
    assert Trial.from_json(done.to_json()) == done
