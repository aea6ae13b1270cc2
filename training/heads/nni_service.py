"""The search for heads in NNI's service: one experiment per layer, its trials on the machines that NNI runs them on.

Whoever reaches a port of the service runs code as who started it: NNI's tuner and trials unpickle what they are sent.
`nni_loopback.js` keeps the service to this machine and this user, unless trials run on other machines.
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
"""Where the script finds out whose a connection is."""
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
    exposed: bool = False
    """Whether the service answers on all interfaces: other machines' trials need it, and nothing else."""

    def __post_init__(self) -> None:
        if self.local and self.exposed:
            raise ConfigError("--expose-nni is for a service file with other machines, whose trials must reach NNI's "
                              "service; here they run on this machine: leave it out")
        if not self.local and not self.exposed:
            raise ConfigError(
                "the service file has trials run on other machines, so NNI's service must answer on all interfaces of "
                "this one, without a password: whoever reaches its ports runs code as you. Pass --expose-nni if a "
                "firewall lets only those machines in, or leave trainingService out to run the trials here")

    @classmethod
    def load(cls, path: Path, *, exposed: bool = False) -> Service:
        """Read a YAML file; what it does not name is as for one trial at a time on this machine.

        Raises:
            ConfigError: it cannot be read, has a key that is not for here, NNI refuses it, or `exposed` is not what its
                trials need.
        """
        data = read_yaml(path, "the service file") or {}
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
        """Command of the interpreter of a trial: this one here, elsewhere the one that `pythonPath` leads to."""
        return shlex.quote(sys.executable) if self.local else "python3"

    @property
    def reach(self) -> str:
        """Who reaches the service, and can thereby run code, as a sentence for the user."""
        if self.exposed:
            return (f"--expose-nni: until the search ends, whoever reaches port {self.port} or {self.port + 1} of this "
                    "machine, from anywhere, runs code as you: let a firewall keep all but the trials' machines out")
        if _USERS.exists():
            return f"only your own processes on this machine reach NNI's service on port {self.port}"
        return (f"other machines do not reach NNI's service on port {self.port}, but other users of this machine do, "
                "and can run code as you: this system does not tell whose a connection is")


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
                          "ee-train again, which goes on where it was") from died
    trials = gather(run, layer.path)
    if not trials:
        raise ServerError(f"none of NNI's trials at {layer.path} came to a result: see the logs in "
                          f"{run.experiments / experiment.id}, and stderr in its folders trials and environments")
    return trials


def _config(settings: Mapping[str, Any], command: str, space: Mapping[str, Any], code: Path) -> ExperimentConfig:
    """Return NNI's configuration of an experiment; the tuner is still to be set."""
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
    """Have the processes that are started in the block write for this user alone and, unless it is exposed, the service
    listen to this user alone."""
    run.experiments.parent.chmod(0o700)  # an earlier attempt may have made it otherwise
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
        # Asked first: whoever else listens on its port by now would say which process is to be ended.
        if psutil.Process(left["process"]).create_time() != left["started"]:
            return
        experiment = Experiment.connect(left["port"])
    except (requests.RequestException, RuntimeError, KeyError, psutil.Error):
        return  # it is gone
    if experiment.id == left["id"]:
        experiment.stop()
    run.running.unlink()
