"""Extensions of NNI's tuner and assessor; one search uses them in this process, the other in NNI's service."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nni
from nni.algorithms.hpo.medianstop_assessor import MedianstopAssessor
from nni.algorithms.hpo.tpe_tuner import TpeTuner
from nni.common.hpo_utils import ParameterSpec, deformat_parameters, format_parameters
from numpy.random import Generator

from early_exit.training.heads.journal import read_journal, read_result
from early_exit.training.heads.space import default_choice, used
from early_exit.training.heads.trial import Trial
from early_exit.training.paths import RunPaths

_PATIENCE = 1000
"""The number of random changes without a new head after which no new head is expected."""


class MedianOfAll(MedianstopAssessor):  # type: ignore[misc]
    """Stops trials that are worse than the median of all trials, including those that were stopped.

    The median of the surviving trials alone would stop nearly every trial.
    """

    def trial_end(self, trial_job_id: int | str, success: bool) -> None:
        super().trial_end(trial_job_id, True)


class HeadTpe(TpeTuner):  # type: ignore[misc]
    """TPE that begins with the default head and proposes no head twice."""

    def __init__(self, seed: int, startup: int) -> None:
        super().__init__("minimize", seed=seed, tpe_args={"n_startup_jobs": startup})
        self._default: dict[tuple[str, ...], int] | None = None

    def update_search_space(self, space: Mapping[str, Any]) -> None:
        super().update_search_space(space)
        self.dedup = _NewHeads(self.space, self.rng)
        default = default_choice(space)
        self._default = None if default is None else format_parameters(default, self.space)

    def generate_parameters(self, parameter_id: int, **more: Any) -> dict[str, Any]:
        parameters: dict[str, Any]
        if self._default is None or self.dedup.knows(self._default):
            parameters = super().generate_parameters(parameter_id, **more)
        else:
            self._running_params[parameter_id] = self.dedup(self._default)
            parameters = deformat_parameters(self._default, self.space)
        return parameters

    def resume(self, trials: Iterable[Trial]) -> None:
        """Learn from the trials of an earlier attempt."""
        self.import_data([{"parameter": trial.parameters, "value": trial.objective} for trial in trials])


class _NewHeads:
    """Replaces NNI's `Deduplicator`, which takes choices for different ones although they describe the same head.

    Of 20 choices of plain TPE for a feature map, a quarter to two fifths were heads that had been tried before.
    """

    def __init__(self, space: Mapping[tuple[str, ...], ParameterSpec], random: Generator) -> None:
        self._space, self._random = space, random
        self._known: set[str] = set()

    def __call__(self, choice: dict[tuple[str, ...], int]) -> dict[tuple[str, ...], int]:
        """Return the choice, with parameters changed at random, one after the other, until it is a new head.

        Raises:
            NoMoreTrialError: no new head was found, because all heads of the space have been tried.
        """
        keys = list(self._space)
        for _ in range(_PATIENCE):
            if not self.knows(choice):
                self.add_history(choice)
                return choice
            key = keys[self._random.integers(len(keys))]
            choice = {**choice, key: self._random.integers(self._space[key].size)}
        raise nni.NoMoreTrialError

    def add_history(self, choice: dict[tuple[str, ...], int]) -> None:
        self._known.add(self._head(choice))

    def knows(self, choice: dict[tuple[str, ...], int]) -> bool:
        return self._head(choice) in self._known

    def _head(self, choice: dict[tuple[str, ...], int]) -> str:
        return repr(sorted(used(deformat_parameters(choice, self._space)).items()))


class JournalTpe(HeadTpe):
    """The tuner for NNI's service. It knows the trials in the journal, and trusts only the file that a trial wrote.

    NNI gives a trial the parameters of another one when trials ask out of order (NNI's issues 5689 and 5726).
    """

    def __init__(self, run: str, layer: str, seed: int, startup: int) -> None:
        super().__init__(seed, startup)
        self._run, self._layer = RunPaths(Path(run)), layer

    def update_search_space(self, space: Mapping[str, Any]) -> None:
        super().update_search_space(space)
        self.resume(read_journal(self._run, self._layer))

    def receive_trial_result(self, parameter_id: int, parameters: Mapping[str, Any], value: Mapping[str, Any],
                             **more: Any) -> None:
        trial = read_result(self._run, self._layer, value["number"])
        self._running_params[parameter_id] = format_parameters(trial.parameters, self.space)
        super().receive_trial_result(parameter_id, trial.parameters, trial.objective, **more)
