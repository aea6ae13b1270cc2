"""One trial of an NNI experiment, on the machine that the experiment's training service chooses.

    python -m early_exit.training.heads.nni_trial RUN LAYER FIRST
"""

from __future__ import annotations

import sys
from pathlib import Path

import nni


def main() -> None:
    """Train and evaluate the head that the tuner asks for; write the result into the folder of the run."""
    # This comes before the imports, because they take a varying number of seconds. If trials ask in another order than
    # they were started, NNI gives them the parameters of others.
    parameters = nni.get_next_parameter()

    from early_exit.training.heads.journal import save_trained, write_result
    from early_exit.training.heads.nni_task import Task
    from early_exit.training.heads.trial import Trial
    from early_exit.training.paths import RunPaths

    run, layer, first = RunPaths(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    if not run.task.exists():
        sys.exit(f"{run.root} is not a run on this machine: trials read the records and write their results there, so "
                 "the folder has to be shared, under the same path on every machine")

    def report(trial: Trial) -> dict[str, float]:
        write_result(run, layer, trial)  # first, because NNI may stop the trial once it knows the result
        return {"default": trial.objective, "number": trial.number, "agreement": trial.agreement}

    def goes_on(trial: Trial) -> bool:
        nni.report_intermediate_result(report(trial))
        return True

    trial, head = Task.load(run).evaluator(run, layer).run(first + nni.get_sequence_id(), parameters, goes_on)
    save_trained(run, layer, trial, head)
    nni.report_final_result(report(trial))


if __name__ == "__main__":
    main()
