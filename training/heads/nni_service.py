"""The search for heads in NNI's service: one experiment per layer, with trials on the machines that NNI is given.

Anyone who reaches a port of the service can run code as the user who started it, because NNI's tuner and trials
unpickle what they receive. `nni_loopback.js` restricts the service to this machine and this user, unless trials run on
other machines.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nni
import psutil
import requests
from nni.experiment import Experiment
from nni.experiment.config import CustomAlgorithmConfig, ExperimentConfig

from early_exit.handler.errors import ConfigError, ServerError, did_you_mean
from early_exit.handler.files.private import replacing
from early_exit.training.heads.journal import gather
from early_exit.training.heads.nni_task import Task
from early_exit.training.heads.search import Search
from early_exit.training.heads.space import SearchSpace
from early_exit.training.heads.trial import Evaluator, Trial
from early_exit.training.paths import RunPaths
from early_exit.training.text_files import read_yaml

_KNOWN = ("trialConcurrency", "trialGpuNumber", "maxExperimentDuration", "maxTrialDuration", "nniManagerIp",
          "trainingService")
_LOCAL = {"trialConcurrency": 1, "maxExperimentDuration": "12h", "trainingService": {"platform": "local"}}
_LOOPBACK = Path(__file__).with_name("nni_loopback.js")
_USERS = Path("/proc/net/tcp")
"""The file in which the script looks up which user a connection belongs to."""
_POLL_SECONDS = 2.0
_STARTS = 3
"""The largest number of times that an experiment is started: NNI gives its tuner ten seconds to connect, which may be
too short on a busy machine."""


@dataclass(frozen=True)
class Service:
    """Where trials run and how many at once, in the keys of NNI's own experiment configuration."""

    settings: Mapping[str, Any] = field(default_factory=lambda: dict(_LOCAL))
    port: int = 8088
    """The port of NNI's web page; TorchServe uses 8080 to 8082."""
    exposed: bool = False
    """Whether the service answers on all interfaces, which only trials on other machines need."""

    def __post_init__(self) -> None:
        if self.local and self.exposed:
            raise ConfigError("--expose-nni is for a service file with other machines, whose trials must reach NNI's "
                              "service, but here all trials run on this machine: leave it out")
        if not self.local and not self.exposed:
            raise ConfigError(
                "the service file runs trials on other machines, so NNI's service must answer on all interfaces of "
                "this machine, without a password: anyone who reaches its ports runs code as you. Pass --expose-nni if "
                "a firewall lets only those machines in, or leave trainingService out to run the trials here")

    @classmethod
    def load(cls, path: Path, *, exposed: bool = False) -> Service:
        """Read a YAML file; keys that it does not name have the values for one trial at a time on this machine.

        Raises:
            ConfigError: the file cannot be read, has a key that is not allowed here, NNI refuses it, or `exposed` does
                not fit the machines of its trials.
        """
        data = read_yaml(path, "the service file") or {}
        if not isinstance(data, dict):
            raise ConfigError(f"expected keys and values in the service file {path}, found {data!r}")
        known = (*_KNOWN, "port")
        for key in data:
            if key not in known:
                raise ConfigError(f"{key!r} in the service file {path} is not a setting of NNI that you can make, "
                                  f"{did_you_mean(key, known)}")
        port = data.pop("port", cls.port)
        if not isinstance(port, int) or not 0 < port < 65536:
            raise ConfigError(f"port in the service file {path} must be a number from 1 to 65535, found {port!r}")
        settings = {**_LOCAL, **data}
        try:
            _config(settings, "true", {}, Path("/")).validate()
            return cls(settings, port, exposed)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"NNI refuses the service file {path}: {error}") from error

    @property
    def local(self) -> bool:
        """Whether all trials run on this machine."""
        return bool(self.settings["trainingService"]["platform"] == "local")

    @property
    def python(self) -> str:
        """The command of a trial's interpreter: on this machine this interpreter, on others `python3`, which is found
        through `pythonPath`."""
        return shlex.quote(sys.executable) if self.local else "python3"

    @property
    def reach(self) -> str:
        """A sentence for the user about who can reach the service, and can therefore run code."""
        if self.exposed:
            return (f"--expose-nni: until the search ends, anyone who reaches port {self.port} or {self.port + 1} of "
                    "this machine, from anywhere, runs code as you: let a firewall admit only the trials' machines")
        if _USERS.exists():
            return f"only your own processes on this machine can reach NNI's service on port {self.port}"
        return (f"other machines cannot reach NNI's service on port {self.port}, but other users of this machine can, "
                "and can run code as you: this system does not tell which user a connection belongs to")


def search_in_service(evaluator: Evaluator, space: SearchSpace, search: Search, service: Service, run: RunPaths,
                      log: Callable[[str], None], on_trials: Callable[[int], object] = lambda n: None) -> list[Trial]:
    """Return the trials of a layer, including those of an earlier attempt.

    Trials and files are the same as for a search in this process: a journal, and the heads beside it. Trials read the
    records in the folder of the run and write their results there, so every machine must see it under the same path.

    Raises:
        ServerError: NNI cannot be started, or no trial of the layer produced a result.
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
    config = _config(service.settings, f"{service.python} {command}",
                     space.choices(layer.shape, evaluator.training_set.recorded), run.task.parent.resolve())
    config.experiment_name = f"early exit at {layer.path}"
    config.experiment_working_directory = str(run.experiments.resolve())
    config.max_trial_number = search.trials - len(trials)
    config.tuner = _algorithm("JournalTpe", run=str(root), layer=layer.path, startup=search.startup,
                              seed=search.seed_for(layer.path, len(trials)))
    config.assessor = _algorithm("MedianOfAll", optimize_mode="minimize")
    known = len(trials)
    log(service.reach)
    for _ in range(_STARTS):
        experiment = _start(config, service, run)
        log(f"NNI's page on the search at {layer.path}: http://127.0.0.1:{service.port}")
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
                          "ee-train again, which continues where it stopped") from died
    trials, logs = gather(run, layer.path), run.experiments / experiment.id
    if not trials:
        raise ServerError(f"none of NNI's trials at {layer.path} produced a result: see the logs in {logs}, and stderr "
                          "in its folders trials and environments")
    if status == "ERROR":
        log(f"NNI's service ended with an error after {len(trials)} of {search.trials} trials at {layer.path}, so the "
            f"best head is chosen among these: see the logs in {logs}")
    return trials


def _config(settings: Mapping[str, Any], command: str, space: Mapping[str, Any], code: Path) -> ExperimentConfig:
    """Return NNI's configuration of an experiment; the caller sets the tuner."""
    return ExperimentConfig(**settings, trialCommand=command, trialCodeDirectory=str(code), searchSpace=space,
                            tuner={"name": "Random"}, logLevel="warning")


def _algorithm(name: str, **arguments: Any) -> CustomAlgorithmConfig:
    return CustomAlgorithmConfig(class_name=f"early_exit.training.heads.nni_algorithms.{name}",
                                 code_directory=str(Path(__file__).parent), class_args=arguments)


def _start(config: ExperimentConfig, service: Service, run: RunPaths) -> Experiment:
    nni.silence_stdout()  # stdout is for the report
    experiment, port = Experiment(config), service.port
    try:
        with _closed_to_others(service, run):
            experiment.start(port)
    except Exception as error:
        raise ServerError(f"NNI does not start on port {port}: {error}; set another 'port' in the service file if it "
                          f"is taken, and see the logs in {run.experiments / experiment.id}") from error
    with replacing(run.running) as scratch:
        process = psutil.Process(experiment._proc.pid)
        scratch.write_text(json.dumps({"id": experiment.id, "port": port, "process": process.pid,
                                       "started": process.create_time()}))
    return experiment


@contextmanager
def _closed_to_others(service: Service, run: RunPaths) -> Iterator[None]:
    """Let processes that are started in the block write files that only this user can read and, unless the service is
    exposed, let the service answer only this user."""
    run.experiments.parent.chmod(0o700)  # an earlier attempt may have created it with other permissions
    before, umask = os.environ.get("NODE_OPTIONS"), os.umask(0o077)
    if not service.exposed:
        os.environ["NODE_OPTIONS"] = f"{before or ''} --require {json.dumps(str(_LOOPBACK), ensure_ascii=False)}"
    try:
        yield
    finally:
        os.umask(umask)
        os.environ.pop("NODE_OPTIONS", None)
        if before is not None:
            os.environ["NODE_OPTIONS"] = before


def _wait(experiment: Experiment, n_results: Callable[[], int], on_trials: Callable[[int], object]) -> str:
    """Return NNI's status when the experiment has ended.

    The status 'NO_MORE_TRIAL' comes before the last trial has ended, so it is not the end. The settings hold the
    deadline.
    """
    before = n_results()
    while True:
        status, now = str(experiment.get_status()), n_results()
        on_trials(now - before)
        before = now
        if status in ("DONE", "STOPPED", "ERROR"):
            return status
        time.sleep(_POLL_SECONDS)


def _stop_left_over(run: RunPaths) -> None:
    """Stop the experiment that a killed search has left behind: nothing else would stop it."""
    if not run.running.exists():
        return
    left = json.loads(run.running.read_text())
    try:
        # The process is checked first: if another program uses the port by now, it would choose the process to stop.
        if psutil.Process(left["process"]).create_time() != left["started"]:
            return
        experiment = Experiment.connect(left["port"])
    except (requests.RequestException, RuntimeError, KeyError, psutil.Error):
        return  # the experiment has ended
    if experiment.id == left["id"]:
        experiment.stop()
    run.running.unlink()
