"""The user's original, ours without exits and ours with exits, side by side on one server, in turns."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from tests.support.client import Reply, send
from tests.support.workers import wait_until_ready, worker_process

ORIGINAL, WITHOUT_EXITS, WITH_EXITS = ARMS = ("original", "without_exits", "with_exits")
SHADOW_RATE = 0.05
"""Share of the requests that both of ours record, the default of a version with exits."""
TURNS = 12
_WARM_UP = 50
_SEALED_S = 8.0
"""Longer than a shard stays open, so that each worker has written what it recorded."""


@dataclass
class Arm:
    """How one of the versions answered; the replies are in the order of the bodies."""

    replies: list[Reply] = field(default_factory=list)
    cpu_s: float = 0.0
    """CPU seconds of its worker per request, pre- and post-processing and what its threads do besides included."""
    mb: float = 0.0
    """Resident size of its worker at the end."""


def measured_in_turns(original: Path, recorder: Path, plan: Path, config: str, folder: Path, records: Path,
                      bodies: Sequence[bytes]) -> dict[str, Arm]:
    """Serve the three versions by one server and return what each did with the same bodies.

    They take turns, in another order each time, so that whatever else the machine does hits all. Both of ours record
    the same share of the requests, and differ in nothing but the exits.

    Args:
        original: a .mar as a user has it.
        recorder: the same, repackaged.
        plan: for the version with exits.
        config: text of model-config.yaml, ending in the block `early_exit`, in which a shard is sealed after 5 s.
        folder: for everything that is made.
        records: where ours record.
        bodies: of the requests.
    """
    store = folder / "store"
    store.mkdir(parents=True)
    shutil.copy(original, store)
    models = [f"{ORIGINAL}={original.name}"]
    for arm, exits in ((WITHOUT_EXITS, "false"), (WITH_EXITS, "true")):
        settings = folder / f"{arm}.yaml"
        settings.write_text(f"{config}  sampling_rate: {SHADOW_RATE}\n  exits: {exits}\n")
        models.append(build_archive(ArchiveRequest(str(recorder), store, plan=plan, model_name=arm,
                                                   config=settings)).name)
    with TorchServe(store, folder / "state", Addresses.free(), records=records, models=models) as server:
        for arm in ARMS:
            wait_until_ready(server, arm)
        return _take_turns(server, {arm: worker_process(server, arm) for arm in ARMS}, bodies)


def _take_turns(server: TorchServe, workers: Mapping[str, psutil.Process], bodies: Sequence[bytes]) -> dict[str, Arm]:
    for arm in ARMS:
        send(server, arm, bodies[:_WARM_UP])  # the first batches fill caches
    time.sleep(_SEALED_S)
    arms, began = {arm: Arm() for arm in ARMS}, {arm: _cpu_s(worker) for arm, worker in workers.items()}
    length = -(-len(bodies) // TURNS)
    for turn, start in enumerate(range(0, len(bodies), length)):
        first = turn % len(ARMS)
        for arm in ARMS[first:] + ARMS[:first]:
            arms[arm].replies += send(server, arm, bodies[start:start + length])
    time.sleep(_SEALED_S)
    for arm, worker in workers.items():
        arms[arm].cpu_s = (_cpu_s(worker) - began[arm]) / len(bodies)
        arms[arm].mb = worker.memory_info().rss / 2**20
    return arms


def _cpu_s(worker: psutil.Process) -> float:
    times = worker.cpu_times()
    return times.user + times.system
