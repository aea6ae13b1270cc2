"""The search for heads in NNI's service: one experiment per layer, its trials on the machines that NNI runs them on."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nni
import requests
import yaml
from nni.experiment import Experiment
from nni.experiment.config import CustomAlgorithmConfig, ExperimentConfig

from early_exit.handler.errors import ConfigError, ServerError, did_you_mean
from early_exit.training.heads.journal import gather
from early_exit.training.heads.nni_task import Task
from early_exit.training.heads.search import Search
from early_exit.training.heads.space import SearchSpace
from early_exit.training.heads.trial import Evaluator, Trial
from early_exit.training.paths import RunPaths, replacing

_KNOWN = ("trialConcurrency", "trialGpuNumber", "maxExperimentDuration", "maxTrialDuration", "nniManagerIp",
          "trainingService")
_LOCAL = {"trialConcurrency": 1, "maxExperimentDuration": "12h", "trainingService": {"platform": "local"}}
_POLL_SECONDS = 2.0
_STARTS = 3
"""An experiment is started at most so often: NNI gives its tuner ten seconds to connect, which a busy machine may not
keep."""


@dataclass(frozen=True)
class Service:
    """Where trials run and how many at once, in the keys of NNI's own experiment configuration."""

    settings: Mapping[str, Any] = field(default_factory=lambda: dict(_LOCAL))
    port: int = 8088
    """The port of NNI's web page; 8080 to 8082 are those of a server."""

    @classmethod
    def load(cls, path: Path) -> Service:
        """Read a YAML file; what it does not name is as for one trial at a time on this machine.

        Raises:
            ConfigError: it cannot be read, has a key that is not for here, or NNI refuses it.
        """
        try:
            data = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the service file {path}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"expected keys and values in the service file {path}, found {data!r}")
        known = (*_KNOWN, "port")
        for key in data:
            if key not in known:
                raise ConfigError(f"{key!r} in the service file {path} is not a setting of NNI that is yours to make, "
                                  f"{did_you_mean(key, known)}")
        port = data.pop("port", cls.port)
        if not isinstance(port, int) or not 0 < port < 65536:
            raise ConfigError(f"port in the service file {path} must be a number from 1 to 65535, found {port!r}")
        service = cls({**_LOCAL, **data}, port)
        try:
            service.config("true", {}, Path("/")).validate()
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"NNI refuses the service file {path}: {error}") from error
        return service

    @property
    def python(self) -> str:
        """Command of the interpreter of a trial: this one here, elsewhere the one that `pythonPath` leads to."""
        return shlex.quote(sys.executable) if self.settings["trainingService"]["platform"] == "local" else "python3"

    def config(self, command: str, space: Mapping[str, Any], code: Path) -> ExperimentConfig:
        """Return NNI's configuration of an experiment; the tuner is still to be set."""
        return ExperimentConfig(**self.settings, trialCommand=command, trialCodeDirectory=str(code), searchSpace=space,
                                tuner={"name": "Random"}, logLevel="warning")


def search_in_service(evaluator: Evaluator, space: SearchSpace, search: Search, service: Service, run: RunPaths,
                      log: Callable[[str], None], on_trials: Callable[[int], object] = lambda n: None) -> list[Trial]:
    """Return the trials of a layer, those of an earlier attempt included.

    The same trials as in this process, and the same files: a journal and the heads beside it. Trials find the
    records in the folder of the run and write their results there, so every machine has to see it under one path.

    Raises:
        ServerError: NNI cannot be started, or no trial of the layer came to a result.
    """
    layer, root = evaluator.layer, run.root.resolve()
    _stop_left_over(run)
    trials = gather(run, layer.path)
    on_trials(len(trials))
    if len(trials) >= search.trials:
        return trials
    Task.of(evaluator).save(run)
    first = 1 + max((trial.number for trial in trials), default=-1)
    command = shlex.join(["-m", "early_exit.training.heads.nni_trial", str(root), layer.path, str(first)])
    config = service.config(f"{service.python} {command}", space.choices(layer.shape, evaluator.training_set.recorded),
                            run.task.parent.resolve())
    config.experiment_name = f"early exit at {layer.path}"
    config.experiment_working_directory = str(run.experiments.resolve())
    config.max_trial_number = search.trials - len(trials)
    config.tuner = _algorithm("JournalTpe", run=str(root), layer=layer.path, startup=search.startup,
                              seed=search.seed_for(layer.path, len(trials)))
    config.assessor = _algorithm("MedianOfAll", optimize_mode="minimize")
    known = len(trials)
    for _ in range(_STARTS):
        experiment = _start(config, service.port, run)
        log(f"NNI's page on the search at {layer.path}: http://127.0.0.1:{service.port} (NNI answers on all interfaces "
            "of this machine, without a password: let a firewall keep others out)")
        status, died = "ERROR", None
        try:
            status = _wait(experiment, lambda: len(run.trial_results(layer.path)), on_trials)
        except requests.RequestException as error:
            died = error
        finally:
            experiment.stop()
            run.running.unlink(missing_ok=True)
        if status != "ERROR" or len(run.trial_results(layer.path)) > known:
            break
    if died is not None:
        raise ServerError(f"NNI's service has died: see the logs in {run.experiments / experiment.id}, and start "
                          "ee-train again, which goes on where it was") from died
    trials = gather(run, layer.path)
    if not trials:
        raise ServerError(f"none of NNI's trials at {layer.path} came to a result: see the logs in "
                          f"{run.experiments / experiment.id}, and stderr in its folders trials and environments")
    return trials


def _algorithm(name: str, **arguments: Any) -> CustomAlgorithmConfig:
    return CustomAlgorithmConfig(class_name=f"early_exit.training.heads.nni_algorithms.{name}",
                                 code_directory=str(Path(__file__).parent), class_args=arguments)


def _start(config: ExperimentConfig, port: int, run: RunPaths) -> Experiment:
    nni.silence_stdout()  # stdout is for the report
    experiment = Experiment(config)
    try:
        experiment.start(port)
    except Exception as error:
        raise ServerError(f"NNI does not start on port {port}: {error}; set another 'port' in the service file if it "
                          f"is taken, and see the logs in {run.experiments / experiment.id}") from error
    with replacing(run.running) as scratch:
        scratch.write_text(json.dumps({"id": experiment.id, "port": port}))
    return experiment


def _wait(experiment: Experiment, n_results: Callable[[], int], on_trials: Callable[[int], object]) -> str:
    """Return NNI's status when it has ended: 'NO_MORE_TRIAL' comes before the last trial does, and a deadline is among
    the settings."""
    before = n_results()
    while True:
        status, now = str(experiment.get_status()), n_results()
        on_trials(now - before)
        before = now
        if status in ("DONE", "STOPPED", "ERROR"):
            return status
        time.sleep(_POLL_SECONDS)


def _stop_left_over(run: RunPaths) -> None:
    """Stop the experiment that a killed search has left behind: nobody else would."""
    if not run.running.exists():
        return
    left = json.loads(run.running.read_text())
    try:
        experiment = Experiment.connect(left["port"])
    except (requests.RequestException, RuntimeError, KeyError):
        return  # it is gone
    if experiment.id == left["id"]:
        experiment.stop()
    run.running.unlink()
