"""Three versions on one server, which take turns: the user's original, ours without exits, and ours with exits."""

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
"""The share of requests that both of our versions record. It is the default of a version with exits."""
TURNS = 12
_WARM_UP = 50
_SEALED_S = 8.0
"""A pause in seconds. It is longer than a shard stays open, so that each worker has then written its records."""


@dataclass
class Arm:
    """The answers of one version; the replies are in the order of the bodies."""

    replies: list[Reply] = field(default_factory=list)
    cpu_s: float = 0.0
    """CPU seconds of the worker per request, including pre- and post-processing and the work of its other threads."""
    mb: float = 0.0
    """The resident size of the worker at the end, in MiB."""


def measured_in_turns(original: Path, recorder: Path, plan: Path, config: str, folder: Path, records: Path,
                      bodies: Sequence[bytes]) -> dict[str, Arm]:
    """Serve the three versions with one server and return the answers of each to the same bodies.

    The versions take turns, in another order each time, so that other work on the machine affects all of them. Both of
    our versions record the same share of requests, and differ only in the exits.

    Args:
        original: a user's .mar file.
        recorder: the same archive, repackaged.
        plan: the plan of the version with exits.
        config: the text of model-config.yaml. It ends in the block `early_exit`, which seals a shard after 5 s.
        folder: the folder for everything that is made.
        records: the folder into which our versions record.
        bodies: the bodies of the requests.
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
        send(server, arm, bodies[:_WARM_UP])  # because the first batches fill caches
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
