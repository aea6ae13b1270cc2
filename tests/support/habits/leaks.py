"""How much the memory of a worker grows while it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from tests.support.habits.habit import Ask
from tests.support.habits.serving import serving, together
from tests.support.habits.trial import EARLY_ANSWERS, WITH_EXITS, Trial, configuration

KINDS = {"pool": WITH_EXITS, "micro_batches": WITH_EXITS, "json_envelope": WITH_EXITS, "strict": WITH_EXITS,
         "plain": EARLY_ANSWERS}
"""The way of answering that each habit is tested with. The habits stand for short-lived threads, for threads that stay,
for instances in envelopes, for requests of which every tenth fails, and for coroutines."""
N_REQUESTS, _N_BEFORE = 10_000, 2_000
_A_TENTH = 10
_MB = 2**20


def worst_growth_mb(trials: Mapping[str, Trial], folder: Path, log: Callable[[str], None]) -> float:
    """Return the largest growth of a worker's resident memory over 10,000 requests, in MiB.

    Args:
        trials: the trials of the habits in `KINDS`, by name.
        folder: the folder in which the habits were tried.
        log: a function that is called with a line about each kind.
    """
    grown = {name: _growth_mb(trials[name], way, folder) for name, way in KINDS.items()}
    for name, growth in grown.items():
        log(f"{name:28}grew by {growth:.1f} MB over {N_REQUESTS} requests")
    return max(grown.values())


def _growth_mb(trial: Trial, way: str, folder: Path) -> float:
    served = trial.ours[way]
    state, config = folder / f"leaks-{trial.habit.name}", configuration(folder, trial.habit.envelope)
    with TorchServe(folder / "store", state, Addresses.free(), config=config) as server, \
            serving(server, [served]) as troubles:
        assert not troubles, troubles
        together(server, served, _asks(trial, _N_BEFORE))
        [worker] = server.workers()
        before = worker.memory_info().rss
        answers = together(server, served, _asks(trial, N_REQUESTS))
        assert {answer.status for answer in answers} <= {200, 400}, {answer.status for answer in answers}
        return (worker.memory_info().rss - before) / _MB


def _asks(trial: Trial, count: int) -> Sequence[Ask]:
    good = list(islice(cycle(trial.batchable), count))
    bad = [ask for ask in trial.habit.asks if ask.fails]
    if trial.habit.name == "strict":
        good[::_A_TENTH] = islice(cycle(bad), len(good[::_A_TENTH]))
    return good
