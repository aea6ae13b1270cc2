"""The trials of a layer on disk: a journal with one JSON line per trial, and files of trials that are not in it yet."""

from __future__ import annotations

from safetensors.torch import save_file

from early_exit.handler.exits.head import Head
from early_exit.handler.files.private import open_private, private_folder, replacing
from early_exit.training.heads.trial import Trial
from early_exit.training.paths import RunPaths


def read_journal(run: RunPaths, layer: str) -> list[Trial]:
    """Return the trials in a layer's journal; a last line that is incomplete after a kill is dropped."""
    path = run.trials(layer)
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Trial.from_json(line) for line in lines if line.endswith("\n")]


def append(run: RunPaths, layer: str, trial: Trial) -> None:
    """Add a trial to its layer's journal, in place of a last line that is incomplete after a kill."""
    path = run.trials(layer)
    private_folder(path.parent)
    with open_private(path, "a+") as file:
        file.seek(0)
        file.truncate(file.read().rfind("\n") + 1)
        file.write(trial.to_json() + "\n")


def save_trained(run: RunPaths, layer: str, trial: Trial, head: Head) -> None:
    """Save the weights of a trial's head."""
    with replacing(run.trial(layer, trial.number)) as scratch:
        save_file(head.state_dict(), scratch)


def write_result(run: RunPaths, layer: str, trial: Trial) -> None:
    """Write the result so far of a trial that runs beside others; `gather` adds it to the journal."""
    with replacing(run.trial_result(layer, trial.number)) as scratch:
        scratch.write_text(trial.to_json())


def read_result(run: RunPaths, layer: str, number: int) -> Trial:
    """Return the result that a trial wrote."""
    return Trial.from_json(run.trial_result(layer, number).read_text())


def gather(run: RunPaths, layer: str) -> list[Trial]:
    """Add the results of a layer's trials to its journal; return all trials in the journal."""
    trials = read_journal(run, layer)
    known = {trial.number for trial in trials}
    for number in sorted(run.trial_results(layer)):
        if number not in known:
            trials.append(read_result(run, layer, number))
            append(run, layer, trials[-1])
    return trials
