"""The search for heads with NNI's tuners, in this process; the journal of each layer survives a kill."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import nni
from nni.assessor import AssessResult

from early_exit.training.heads.journal import append, read_journal, save_trained
from early_exit.training.heads.nni_algorithms import HeadTpe, MedianOfAll
from early_exit.training.heads.space import SearchSpace
from early_exit.training.heads.trial import Evaluator, Trial
from early_exit.training.paths import RunPaths


@dataclass(frozen=True)
class Search:
    """The extent of the search for each layer."""

    trials: int = 20
    startup: int = 8
    """The number of trials, with the default head and random heads, before the tuner models the results."""
    seed: int = 0

    def seed_for(self, layer: str, n_done: int) -> int:
        """Return a seed that differs by layer and after a restart, so that the tuner does not draw the same heads."""
        return zlib.crc32(f"{self.seed} {layer} {n_done}".encode())


def search_layer(evaluator: Evaluator, space: SearchSpace, search: Search, run: RunPaths,
                 on_trials: Callable[[int], object] = lambda n: None) -> list[Trial]:
    """Return the trials of a layer, including those of an earlier attempt.

    Each trial's result is one line of the layer's journal, and its head is stored beside it, so a killed search loses
    at most the trial that was running. `on_trials` receives the number of trials done since its last call.
    """
    layer, recorded = evaluator.layer, evaluator.training_set.recorded
    trials = read_journal(run, layer.path)
    logging.getLogger("nni").setLevel(logging.ERROR)  # it logs its seed for every layer
    tuner = HeadTpe(search.seed_for(layer.path, len(trials)), search.startup)
    tuner.update_search_space(space.choices(layer.shape, recorded))
    tuner.resume(trials)
    assessor = MedianOfAll("minimize")
    for trial in trials:
        assessor.assess_trial(trial.number, trial.history)
        assessor.trial_end(trial.number, True)
    on_trials(len(trials))
    for number in range(len(trials), search.trials):
        try:
            parameters = tuner.generate_parameters(number)
        except nni.NoMoreTrialError:  # every head of the space has been tried
            on_trials(search.trials - number)
            break
        trial, head = evaluator.run(
            number, parameters,
            lambda so_far: assessor.assess_trial(so_far.number, so_far.history) is AssessResult.Good)
        save_trained(run, layer.path, trial, head)
        append(run, layer.path, trial)
        assessor.trial_end(number, True)
        tuner.receive_trial_result(number, parameters, trial.objective)
        tuner.trial_end(number, True)
        trials.append(trial)
        on_trials(1)
    return trials


def best_trial(trials: list[Trial]) -> Trial | None:
    """Return the trial with the least objective, or None when no head is better than chance.

    A trial that was stopped early is returned only if no finished one is better than chance; its head is trained in
    full later.
    """
    return min((trial for trial in trials if trial.better_than_chance),
               key=lambda trial: (trial.stopped, trial.objective), default=None)
