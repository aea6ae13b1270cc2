"""The search for heads with NNI's tuners, in this process; the journal of each layer survives a kill."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import nni
from nni.algorithms.hpo.medianstop_assessor import MedianstopAssessor
from nni.algorithms.hpo.tpe_tuner import TpeTuner
from nni.assessor import AssessResult
from safetensors.torch import save_file

from early_exit.training.paths import RunPaths, replacing
from early_exit.training.space import SearchSpace, spec_of
from early_exit.training.trial import Evaluator, Trial


@dataclass(frozen=True)
class Search:
    """How much is tried for each layer."""

    trials: int = 20
    startup: int = 8
    """So many trials are drawn at random before the tuner models what it has seen."""
    seed: int = 0

    def seed_for(self, layer: str, n_done: int) -> int:
        """Return a seed that differs by layer, and after a restart, where the tuner would draw the same heads again."""
        return zlib.crc32(f"{self.seed} {layer} {n_done}".encode())


def search_layer(evaluator: Evaluator, space: SearchSpace, search: Search, run: RunPaths,
                 on_trials: Callable[[int], object] = lambda n: None) -> list[Trial]:
    """Return the trials of a layer, those of an earlier attempt included.

    Each trial's result is one line of the layer's journal, and its head lies beside, so a killed search
    loses at most the trial that was running. `on_trials` is told how many more are done.
    """
    layer, recorded = evaluator.layer, evaluator.material.recorded
    trials = read_journal(run, layer.path)
    logging.getLogger("nni").setLevel(logging.ERROR)  # it tells how it avoids trying a head twice
    tuner = TpeTuner("minimize", seed=search.seed_for(layer.path, len(trials)),
                     tpe_args={"n_startup_jobs": search.startup})
    tuner.update_search_space(space.choices(layer.shape, recorded))
    tuner.import_data([{"parameter": trial.parameters, "value": trial.objective} for trial in trials])
    assessor = MedianstopAssessor("minimize")
    for trial in trials:
        _remember(assessor, trial)
    on_trials(len(trials))
    for number in range(len(trials), search.trials):
        try:
            parameters = tuner.generate_parameters(number)
        except nni.NoMoreTrialError:  # every head of the space has been tried
            on_trials(search.trials - number)
            break
        trial, head = evaluator.run(
            number, parameters, spec_of(parameters, layer.shape, recorded),
            lambda history, number=number: assessor.assess_trial(number, history) is AssessResult.Good)  # type: ignore[misc]
        with replacing(run.trial(layer.path, number)) as scratch:
            save_file(head.state_dict(), scratch)
        append(run, layer.path, trial)
        _remember(assessor, trial)
        tuner.receive_trial_result(number, parameters, trial.objective)
        tuner.trial_end(number, True)
        trials.append(trial)
        on_trials(1)
    return trials


def best_trial(trials: list[Trial]) -> Trial | None:
    """Return the finished trial with the least objective, or None when no head is better than chance."""
    return min((trial for trial in trials if trial.better_than_chance and not trial.stopped),
               key=lambda trial: trial.objective, default=None)


def read_journal(run: RunPaths, layer: str) -> list[Trial]:
    """Return the trials in a layer's journal; a line that a kill cut short is dropped."""
    path = run.trials(layer)
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Trial.from_json(line) for line in lines if line.endswith("\n")]


def append(run: RunPaths, layer: str, trial: Trial) -> None:
    """Add a trial to its layer's journal, in place of a line that a kill cut short."""
    path = run.trials(layer)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    with path.open("r+" if path.exists() else "w") as file:
        file.truncate(text.rfind("\n") + 1)
        file.seek(0, 2)
        file.write(trial.to_json() + "\n")


def _remember(assessor: MedianstopAssessor, trial: Trial) -> None:
    assessor.assess_trial(trial.number, trial.history)
    # Stopped ones count too: a median of the survivors alone would stop nearly everybody.
    assessor.trial_end(trial.number, True)
