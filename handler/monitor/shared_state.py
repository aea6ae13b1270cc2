"""The monitor's state in the records folder. The workers of a version share it, and it survives restarts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from early_exit.handler.errors import FormatError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.files.private import open_private, private_folder, read_private, replacing
from early_exit.handler.monitor.blocks import Sample
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import Alarm, MonitorState

logger = logging.getLogger(__name__)

MONITOR_FILES = "monitor-*.json"
_SHARE_EVERY_S = 1.0
_LOCKED_FOR_S = 2.0
"""How long a worker waits for the lock, which others hold for as long as they write one small file."""
_TRY_LOCK_EVERY_S = 0.02
_CLOSING_FOR_S = 10.0
"""How long closing waits for the thread, which a disk that does not answer stops for as long as it likes."""
_MOST_UNSHARED = 10_000
_MOST_QUEUED = 10_000
"""The largest number of calls of `note` that wait for the thread, as they do while a disk does not answer."""


def monitor_file(folder: Path, version: str, plan: ExitPlan) -> Path:
    """Return the file in which the workers of a version that serve a plan keep their monitor's state.

    Args:
        folder: folder with the records of the plan's backbone.
        version: version of the model.
        plan: the plan that the workers serve.
    """
    return folder / f"monitor-{version}-{plan.digest()}.json"


def read_state(path: Path) -> MonitorState | None:
    """Return the state in a file, or None if there is no file.

    Raises:
        OSError: the file cannot be read, is a link, or belongs to somebody else.
        FormatError: this version does not read the file's format.
        ValueError: the file does not hold the state of a monitor.
    """
    try:
        return MonitorState.from_json(json.loads(read_private(path)), str(path))
    except FileNotFoundError:
        return None


class SharedMonitor:
    """Takes shadow samples from the serving thread and adds them to the state from a thread of its own.

    Every second, each worker locks the file, adds its samples to the state in it and renames the result into place. So
    all workers feed one test, and every sample counts once, in an order that does not depend on its loss. If samples
    form blocks, this is the order of their times, and the newest samples wait in the state for two seconds. The kernel
    releases the lock of a killed worker, which loses the samples of at most one second. If a worker has no folder,
    cannot write to it, or does not get the lock within two seconds because another worker was stopped while it held it,
    it continues alone from the last state that it has read. It adds its samples to the file as soon as it can write.
    Whatever a worker reads, it never goes back to a lower fallback level and forgets no alarm.

    If a worker starts and cannot read the file that is there, an alarm may be lost. It therefore starts at the last
    level, with an alarm that no sample has raised, so that every reader of the state knows that the certificate may be
    void. A damaged file is replaced by this state, and a file that is not ours or too new is left as it is.
    """

    def __init__(self, monitored: Monitored, last_level: int, path: Path | None) -> None:
        """Read the state, if there is one, and start the thread.

        Args:
            monitored: the loss that is tested.
            last_level: the fallback level without exits, at which nothing is left to test.
            path: file of the shared state, or None to keep the state in memory.
        """
        self.monitored = monitored
        self._last_level, self._path = last_level, path
        self._is_unwritten = False
        """Whether `_shared` holds something that could not be written to the file yet."""
        self._shared = self.state = self._at_start()
        self._unshared: list[Sample] = []
        self._failing = False
        self._share()
        self._queue: queue.SimpleQueue[Sequence[Sample] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="early-exit-monitor", daemon=True)
        self._thread.start()

    def note(self, samples: Sequence[Sample]) -> None:
        """Queue shadow samples; this never blocks. If too many wait, these are dropped, whatever their losses."""
        if self._queue.qsize() < _MOST_QUEUED:
            self._queue.put(samples)

    def close(self) -> None:
        """Share the queued samples and stop the thread; a thread that the disk does not let go of is left behind."""
        self._queue.put(None)
        self._thread.join(_CLOSING_FOR_S)
        if self._thread.is_alive():
            logger.warning("the monitor's state in %s could not be shared within %.0f s, and the newest samples are "
                           "lost: does the disk answer?", self._path, _CLOSING_FOR_S)

    def _run(self) -> None:
        share_at = time.monotonic() + _SHARE_EVERY_S
        while True:
            noted: Sequence[Sample] | None = []
            with contextlib.suppress(queue.Empty):
                noted = self._queue.get(timeout=max(0.0, share_at - time.monotonic()))
            self._unshared += noted or ()
            if noted is None or time.monotonic() >= share_at:
                try:
                    self._share()
                except Exception:  # no side task may end this thread
                    logger.exception("the monitor failed; requests are still answered, at fallback level %d",
                                     self.state.step)
                share_at = time.monotonic() + _SHARE_EVERY_S
            if noted is None:
                return

    def _at_start(self) -> MonitorState:
        try:
            return MonitorState() if self._path is None else read_state(self._path) or MonitorState()
        except NotADirectoryError:  # there is no folder, so there is no file either
            return MonitorState()
        except (OSError, ValueError, FormatError) as error:
            logger.error("cannot read the monitor's state in %s: %s. It may hold an alarm, so the version goes to "
                         "fallback level %d, at which no request leaves early, until ee-watch brings a new plan in. To "
                         "start anew, stop all workers of the version, delete this file and start them again",
                         self._path, error, self._last_level)
            self._is_unwritten = True
            return MonitorState(self._last_level, alarms=(Alarm(0, time.time(), n=0, mean_loss=0.0, wealth=0.0),))

    def _share(self) -> None:
        before = self.state
        try:
            if self._path is None:
                self._shared, self._unshared = self._advanced(self._shared), []
            else:
                self._share_in(self._path)
            self.state, self._failing = self._shared, False
        except (OSError, ValueError, FormatError) as error:
            if not self._failing:
                logger.warning("cannot share the monitor's state in %s: %s. Until it can be shared, this worker "
                               "watches alone.", self._path, error)
            self._failing = True
            self.state = self._advanced(self._shared)
            # An alarm is kept at once. Together with the samples of other workers, its samples might raise none later.
            if len(self._unshared) > _MOST_UNSHARED or self.state.alarms != self._shared.alarms:
                self._shared, self._unshared, self._is_unwritten = self.state, [], True
        known = {alarm.step for alarm in before.alarms}
        for alarm in (alarm for alarm in self.state.alarms if alarm.step not in known):
            if not alarm.n:
                logger.error("a worker of this version could not read the monitor's state in %s, which may have held "
                             "an alarm: the certificate may be void, and the version goes to fallback level %d of %d",
                             self._path, self.state.step, self._last_level)
                continue
            logger.error("ALARM: the mean loss of %d shadow samples is %.4f, and the certificate allows at most %.4f: "
                         "the certificate is void, and the version goes to fallback level %d of %d", alarm.n,
                         alarm.mean_loss, self.monitored.tolerance, alarm.step + 1, self._last_level)

    def _share_in(self, path: Path) -> None:
        if not self._unshared and not self._is_unwritten:
            # Writers replace the whole file, so it can be read without the lock.
            self._shared = merged(self._shared, read_state(path))
            return
        private_folder(path.parent)
        with _locked(path.with_suffix(".lock")):
            try:
                written = read_state(path)
            except ValueError as error:
                logger.warning("the monitor's state in %s is damaged and will be replaced: %s", path, error)
                written = None
            state = self._advanced(merged(self._shared, written))
            state = replace(state, origin=state.origin or uuid.uuid4().hex)
            with replacing(path) as scratch, scratch.open("w") as file:
                file.write(json.dumps(state.to_json()))
                file.flush()
                os.fsync(file.fileno())  # a crash of the machine may otherwise leave an empty file
        self._shared, self._unshared, self._is_unwritten = state, [], False

    def _advanced(self, state: MonitorState) -> MonitorState:
        return state.after(self._unshared, self.monitored, self._last_level, time.time())


def watch(plan: ExitPlan | None, folder: Path | None, version: str) -> SharedMonitor | None:
    """Start to watch the certificate of a plan; return None if the plan has no certificate or no exits.

    Args:
        plan: the plan that is served, or None if the version serves without one.
        folder: folder with the records of the plan's backbone, or None to let this worker watch alone.
        version: version of the model.
    """
    if plan is None or plan.certificate is None or not plan.exits:
        return None
    path = None if folder is None else monitor_file(folder, version, plan)
    return SharedMonitor(Monitored.of(plan.certificate, plan.likeness), plan.last_level, path)


def merged(own: MonitorState, read: MonitorState | None) -> MonitorState:
    """Return the state with the higher fallback level, and with the alarms of both states.

    At equal levels, the evidence with more samples is kept. This choice does not depend on the losses. Of two alarms
    at one level, the one that samples have raised is kept, or the older one of two such alarms: an alarm without
    samples only says that a worker could not read the state. The certificate may be void since the earlier time.

    Args:
        own: the state that the worker has in memory.
        read: the state in the file, or None if there is no file.
    """
    if read is None:
        return own
    ahead = own if (own.step, own.evidence.n) > (read.step, read.evidence.n) else read
    of_step: dict[int, list[Alarm]] = defaultdict(list)
    for alarm in (*own.alarms, *read.alarms):
        of_step[alarm.step].append(alarm)
    return replace(ahead, origin=read.origin or own.origin, alarms=tuple(
        replace(min(alarms, key=lambda alarm: (not alarm.n, alarm.time)), time=min(alarm.time for alarm in alarms))
        for _, alarms in sorted(of_step.items())))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + _LOCKED_FOR_S
    with open_private(path, "w") as file:
        while not _is_locked(file):
            # Whoever was stopped by a signal, a debugger or a disk keeps the lock. The monitors of the other workers
            # must not stop, too.
            if time.monotonic() >= deadline:
                raise TimeoutError(f"another process has held the lock {path} for {_LOCKED_FOR_S:.0f} s. Was a worker "
                                   "stopped? 'lslocks' names it; end it or let it continue")
            time.sleep(_TRY_LOCK_EVERY_S)
        yield


def _is_locked(file: IO[Any]) -> bool:
    """Lock a file, if nobody else holds its lock; return whether it is locked now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
