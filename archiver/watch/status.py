"""The state of a served model: its plan, its records and its monitors."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from early_exit.archiver.control import ModelServer, default_of
from early_exit.archiver.packaging.configuration import serving_config
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import FormatError, RecordError, ServerError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import merged, monitor_file, read_state
from early_exit.handler.recording.format import ShardHeader, read_header
from early_exit.training.data.shards import find_shards, is_folder_of, of_traffic, readable_shards, times_of
from early_exit.training.data.sources import local_folders
from early_exit.training.data.traffic import traffic_of


@dataclass(frozen=True)
class ModelStatus:
    """One look at a served model."""

    model: str
    version: str
    registered: tuple[str, ...]
    """All versions of the model that the server has."""
    archive: Path
    backbone: BackboneDescription
    plan: ExitPlan | None
    traffic: str
    """The identity of the archive's traffic; empty if it is not known."""
    shards: tuple[Path, ...]
    """The shards of this traffic that can be read: a damaged one must not stop the loop."""
    times: Tensor
    """(N,) float64 Unix times in seconds, ascending, of the records that can be evidence."""
    monitors: tuple[MonitorState, ...]
    """The states of the monitors of this version and plan, one for each folder of a worker that has one. A copy of a
    state, as in a mirror of the folder, is not one more."""
    config: ServingConfig = field(default_factory=ServingConfig)
    """How the archive's configuration serves and records."""
    is_recorded: bool = False
    """Whether this version made some of the records."""

    @property
    def alarm_times(self) -> tuple[float, ...]:
        """Unix times of all alarms of this version, ascending."""
        return tuple(sorted(alarm.time for state in self.monitors for alarm in state.alarms))

    @property
    def alarm_names(self) -> tuple[str, ...]:
        """A name for each alarm of this version, which it keeps: that of the monitor's state, and the fallback level.

        The times of alarms cannot tell which of them came first, because hosts' clocks differ.
        """
        return tuple(sorted(f"{state.origin or alarm.time} level {alarm.step}"  # earlier versions wrote no origin
                            for state in self.monitors for alarm in state.alarms))

    @property
    def first_alarm(self) -> float | None:
        """The Unix time at which the certificate became void; None while it holds."""
        return self.alarm_times[0] if self.alarm_times else None

    @property
    def is_state_lost(self) -> bool:
        """Whether no alarm was raised by samples, but one because a worker could not read its monitor's state."""
        alarms = [alarm for state in self.monitors for alarm in state.alarms]
        return bool(alarms) and not any(alarm.n for alarm in alarms)

    @property
    def n_watched(self) -> int:
        """The number of shadow samples of this version that the monitors have seen."""
        return sum(map(_watched, self.monitors))

    @property
    def n_tested(self) -> int:
        """A lower bound on the number of contents that were bet on since the last alarm; at least half of their number.

        Copies, samples in blocks that are open or skipped, and samples that wait are in no bet. If few contents come
        again and again, only the bets on requests go on, and their samples count instead of new contents.
        """
        return sum(map(self._tested, self.monitors))

    @property
    def n_on_trial(self) -> int:
        """The number of shadow samples that have spoken for a version on trial.

        They are those of monitors that have bet so much that they would have raised an alarm if all answers had been
        wrong. Each monitor raises its alarm alone, so the others tell nothing yet: while one scene lasts, or if all
        samples are copies, there are no bets. `n_tested` may be as low as half of the number of contents.
        """
        certificate = self.plan.certificate if self.plan else None
        return 0 if certificate is None else sum(
            min(_watched(state), 2 * self._tested(state)) for state in self.monitors
            if state.evidence.shows_wrong_answers(Monitored.of(certificate).delta))

    def _tested(self, state: MonitorState) -> int:
        certificate = self.plan.certificate if self.plan else None
        per_round = Monitored.of(certificate).samples_per_round if certificate else 0
        return max(state.evidence.n_tested, state.evidence.requests.rounds * per_round)

    def has_alarm_after(self, time: float) -> bool:
        """Tell whether an alarm came after a Unix time."""
        return any(alarm > time for alarm in self.alarm_times)

    def n_newer(self, than: float) -> int:
        return int((self.times > than).sum())


def look(server: ModelServer, model: str, store: Path, sources: Sequence[str], cache: Path,
         log: Callable[[str], None] = lambda line: None) -> ModelStatus:
    """Return the state of a served model.

    Args:
        server: the server that serves the model.
        model: the name of the model.
        store: the server's model store.
        sources: records folders and URLs.
        cache: the folder for copies of records from URLs.
        log: receives lines about shards that are skipped.

    Raises:
        EarlyExitError: the server does not answer or does not serve the model, its archive is not one of ours, there is
            no records folder, or a monitor's state cannot be read.
    """
    versions = server.versions(model)
    served = default_of(versions)
    if served is None:
        raise ServerError(f"{server} does not serve {model}")
    archive = store / served.file_name
    contents = read_archive(archive)
    if (contents.model, contents.version) != (model, served.version):
        raise ServerError(f"{server} says that it serves {model} {served.version} from {archive.name}, but the file of "
                          f"this name in the store is {contents.model} {contents.version}: nothing is renewed. Do both "
                          "have the same model store?")
    backbone, plan = contents.description, contents.plan
    folders = [folder for folder in local_folders(sources, cache) if folder.is_dir()]
    if not folders:
        raise RecordError(f"none of the records folders {', '.join(sources)} exists: pass the folders that the servers "
                          "write to")
    traffic = traffic_of(contents)
    headers, times = _records(folders, model, backbone, traffic, log)
    return ModelStatus(
        model, served.version, tuple(registered.version for registered in versions), archive, backbone, plan, traffic,
        tuple(headers), torch.cat([torch.empty(0, dtype=torch.float64), *times]).sort().values,
        _monitors(folders, model, served.version, backbone, plan), serving_config(contents.configuration),
        any(header.version == served.version for header in headers.values()))


def _records(folders: Sequence[Path], model: str, backbone: BackboneDescription, traffic: str,
             log: Callable[[str], None]) -> tuple[dict[Path, ShardHeader], list[Tensor]]:
    """Return the headers of the shards of the given traffic, and the times of their records that can be evidence."""
    try:
        found = find_shards(folders, model, backbone, log)
    except RecordError:  # there are none yet
        return {}, []
    try:
        shards = of_traffic(readable_shards(found, log), traffic, log)
        times, headers = times_of(shards), {shard: read_header(shard) for shard in shards}
    except RecordError as error:  # all are damaged or of other traffic, or one was just deleted
        log(str(error))
        return {}, []
    return headers, [times[shard] for shard, header in headers.items() if header.content_key]


def _monitors(folders: Sequence[Path], model: str, version: str, backbone: BackboneDescription,
              plan: ExitPlan | None) -> tuple[MonitorState, ...]:
    if plan is None:
        return ()
    states: dict[str, MonitorState] = {}
    for path in _monitor_files(folders, model, version, backbone, plan):
        try:
            state = read_state(path)
        except (OSError, ValueError, FormatError) as error:
            raise RecordError(
                f"cannot read the monitor's state in {path}: {error}. It may hold an alarm, so it is not known whether "
                f"the certificate holds, and a worker of {model} {version} that starts now answers without exits. Let "
                "its owner run this, or the version that wrote it; or stop all workers of the version, delete the file "
                "and start them again") from error
        if state is not None:
            same = state.origin or repr(state)  # earlier versions wrote no origin
            states[same] = merged(state, states.get(same))
    return tuple(states.values())


def _monitor_files(folders: Sequence[Path], model: str, version: str, backbone: BackboneDescription,
                   plan: ExitPlan) -> Iterator[Path]:
    """Yield the files in which there may be states of the monitor: wherever the records of the model are found, too.

    A folder may be that of a worker, a part of it, or one above the folders of several hosts.
    """
    header = ShardHeader(model, version, backbone.sha256, None, ())
    for folder in folders:
        own = monitor_file(header.folder(folder), version, plan)
        yield own
        for path in folder.rglob(glob.escape(own.name)):
            if path != own and is_folder_of(path.parent, model, backbone):
                yield path


def _watched(state: MonitorState) -> int:
    return state.evidence.n + sum(alarm.n for alarm in state.alarms)
