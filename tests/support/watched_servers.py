"""A watcher of servers in memory, whose rolls are real and take no real time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from early_exit.archiver.control import RunSettings, VersionStatus
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout import fleet
from early_exit.archiver.rollout.retiring import retire
from early_exit.archiver.watch import served
from early_exit.archiver.watch import watcher as watching
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.triggers import Terms
from early_exit.archiver.watch.watched import Watched
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.training.options import TrainingOptions
from tests.archiver.test_renewal import Training, WatcherOfSights, seen
from tests.support.server_in_memory import ServerInMemory
from tests.support.slow_server import plain_mar
from tests.support.virtual_clock import VirtualClock

LIMITS = {"untried": True, "longest_batch_s": 0.0, "drain_limit_s": 2.0}


class WatcherOfServers(WatcherOfSights):
    """A watcher with a real audit that sees which version the first server serves, and trains nothing."""

    monitors: dict[str, MonitorState]
    """The state of the monitor of each version that has one."""

    def look(self) -> ModelStatus:
        first = self._watched.servers[0]
        assert isinstance(first, ServerInMemory) and first.default is not None
        monitors = [self.monitors[first.default]] if first.default in self.monitors else []
        return replace(seen(3000, *monitors, version=first.default), registered=tuple(first.registered))


class NamedByClients(ServerInMemory):
    """A server with a client that names version 2.0 in its requests, so that this version is never idle."""

    def versions(self, model: str) -> list[VersionStatus]:
        return [replace(status, pending_requests=int(status.version == "2.0")) for status in super().versions(model)]


def serving(server: ServerInMemory) -> ServerInMemory:
    """Return a server that serves digits 2.0, whose archive is made if the store has none."""
    plain_mar(server.store, "2.0")
    server.register("digits-2.0.mar", RunSettings())
    server.calls.clear()
    return server


def note_roll(watcher: WatcherOfServers, event: str = "rolling", tries: int = 1) -> None:
    """Note the beginning of a roll of digits 3.0."""
    watcher._watched.audit.append(event, version="3.0", archive="digits-3.0.mar", replaces="2.0", tries=tries, why="-",
                                  replaced_archive="digits-2.0.mar", new=None, current=None, current_cost_now=None)


@contextmanager
def watching_servers(servers: Sequence[ServerInMemory], state: Path) -> Iterator[WatcherOfServers]:
    """Yield a watcher of servers with a common store, in which it packs plain archives."""
    store = servers[0].store
    watcher = WatcherOfServers(Watched(
        "digits", servers, store, [str(store)], state, lambda archive: TrainingOptions(), None,
        Terms(0.02, 0.05, 30 * 24 * 3600.0), trial_samples=300, longest_batch_s=0.0))
    watcher.training, watcher.monitors = Training(), {}

    def build(asked: ArchiveRequest, log: object) -> Path:
        return plain_mar(store, str(asked.version))

    with ExitStack() as patches:
        for module in (watching, served):
            patches.enter_context(mock.patch.object(module, "roll_all", roll_at_once))
        patches.enter_context(mock.patch.object(served, "retire", functools.partial(
            retire, drain_limit_s=2.0, clock=VirtualClock())))
        patches.enter_context(mock.patch.object(watching, "build_archive", build))
        yield watcher


def roll_at_once(servers: Sequence[ServerInMemory], mar: Path, **more: object) -> None:
    """Roll an archive into servers."""
    limits: dict[str, object] = {**LIMITS, "clock": VirtualClock(), **more}
    fleet.roll_all(servers, mar, **limits)  # type: ignore[arg-type]
