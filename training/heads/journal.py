"""The trials of a layer on disk: a journal of one JSON line each, and trials elsewhere that are not in it yet."""

from __future__ import annotations

from safetensors.torch import save_file

from early_exit.handler.exits.head import Head
from early_exit.handler.files.private import open_private, private_folder, replacing
from early_exit.training.heads.trial import Trial
from early_exit.training.paths import RunPaths


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
    private_folder(path.parent)
    with open_private(path, "a+") as file:
        file.seek(0)
        file.truncate(file.read().rfind("\n") + 1)
        file.write(trial.to_json() + "\n")


def save_trained(run: RunPaths, layer: str, trial: Trial, head: Head) -> None:
    """Keep the weights of a trial."""
    with replacing(run.trial(layer, trial.number)) as scratch:
        save_file(head.state_dict(), scratch)


def write_result(run: RunPaths, layer: str, trial: Trial) -> None:
    """Write what a trial that runs beside others has found so far; `gather` brings it into the journal."""
    with replacing(run.trial_result(layer, trial.number)) as scratch:
        scratch.write_text(trial.to_json())


def read_result(run: RunPaths, layer: str, number: int) -> Trial:
    """Return what a trial wrote."""
    return Trial.from_json(run.trial_result(layer, number).read_text())


def gather(run: RunPaths, layer: str) -> list[Trial]:
    """Bring the results of a layer's trials into its journal; return all that it holds."""
    trials = read_journal(run, layer)
    known = {trial.number for trial in trials}
    for number in sorted(run.trial_results(layer)):
        if number not in known:
            trials.append(read_result(run, layer, number))
            append(run, layer, trials[-1])
    return trials
