"""The loop of the product against a real server: record, train, repackage, roll, measure."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.protocol import FULL_NAME
from early_exit.handler.recording.format import list_shards, read_shard
from early_exit.training.data.shards import find_shards
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.report.summary import RunReport
from tests.support.arms import WITH_EXITS, Arm, measured_in_turns
from tests.support.client import BackgroundLoad, Reply, send

Beside = Callable[[TorchServe], AbstractContextManager[object]]


@dataclass(frozen=True)
class LoopResult:
    """The results of the loop."""

    recording: list[Reply]
    rolling: list[Reply]
    """The replies while the version with exits was rolled in."""
    arms: Mapping[str, Arm]
    """The arms by their names in `ARMS`. Replies are in the order of the measured bodies."""
    n_records: int
    record_bytes: int
    report: RunReport
    recorder: Path
    """The archive that records and gives full answers."""
    exiting: Path
    """The archive with exits."""

    @property
    def replies(self) -> list[Reply]:
        return [*self.recording, *self.rolling, *(reply for arm in self.arms.values() for reply in arm.replies)]

    def hits(self) -> dict[str, float]:
        """Return the share of the measured requests that left at each exit, in the order of the backbone."""
        replies = self.arms[WITH_EXITS].replies
        taken = Counter(reply.exit for reply in replies)
        return {name: taken[name] / len(replies) for name in (*(one.layer for one in self.report.exits), FULL_NAME)}

    def exits(self) -> list[dict[str, Any]]:
        """Return three values for each exit, and for the whole model at the end: its layer, the share of the model's
        FLOPs that is spent up to it, and the share of the measured requests that left there."""
        cost = {one.layer: one.cost for one in self.report.plan.exits}
        return [{"layer": name, "cost": cost.get(name, 1.0), "share": share} for name, share in self.hits().items()]

    def accuracy(self, arm: str, labels: Sequence[str]) -> float:
        """Return the share of the measured requests whose likeliest class is the label."""
        return sum(reply.ok and reply.top() == label
                   for reply, label in zip(self.arms[arm].replies, labels)) / len(labels)

    def disagreement(self, arm: str, other: str) -> float:
        """Return the share of the measured requests that two versions answer differently. A failed request counts as
        one of them."""
        pairs = list(zip(self.arms[arm].replies, self.arms[other].replies))
        return sum(not (one.ok and another.ok and one.top() == another.top()) for one, another in pairs) / len(pairs)


def run_loop(original: Path, folder: Path, record: Sequence[bytes], measure: Sequence[bytes], *,
             input_shape: tuple[int, ...], config: str, options: TrainingOptions,
             log: Callable[[str], None] = print, beside: Beside = nullcontext) -> LoopResult:
    """Run the whole loop with an original archive. The servers stop even if a step fails.

    Args:
        original: a user's .mar file.
        folder: the folder for everything that is made.
        record: the request bodies to record and train on.
        measure: the request bodies to measure with. They are also the load during the roll.
        input_shape: the input shape of the model, for `ee-archive`.
        config: the text of the original's model-config.yaml; see `measured_in_turns`.
        options: the options of `ee-train`.
        log: a function that is called with a line about each step.
        beside: a context manager that runs beside the server on which exits are rolled in.
    """
    store, records = folder / "model-store", folder / "records"
    store.mkdir(parents=True)
    shutil.copy(original, store)
    server = TorchServe(store, folder / "state", Addresses.free(), records=records, models=[original.name])
    with server, beside(server):
        management = Management(server.addresses, server.key_file, server.secret_file)
        log(f"ee-serve    TorchServe with the original model at {server.addresses.inference}")
        name = original.stem
        recorder = build_archive(ArchiveRequest(str(original), store, input_shape=input_shape))
        backbone = read_archive(recorder).description
        log(f"ee-archive  {recorder.name} records and answers in full")
        roll(management, recorder)
        log("ee-roll     rolled in; recording")
        recording = send(server, name, record)
        n_records = _wait_for_records(records, len(recording))
        shards = find_shards(records, name, backbone)
        record_bytes = sum(shard.stat().st_size for shard in shards)
        log(f"            {n_records} records, {record_bytes / n_records / 1000:.1f} kB each")
        run = RunPaths(folder / "run")
        unpacked = ArchiveLayout(folder / "recorder")
        extract(recorder, unpacked.root)
        report = train(name, unpacked, shards, options, run)
        log(f"ee-train    {len(report.exits)} exits of {len(report.heads)} candidates")
        exiting = build_archive(ArchiveRequest(str(recorder), store, plan=run.plan))
        log(f"ee-archive  {exiting.name} exits early")
        with BackgroundLoad(server, name, measure) as load:
            roll(management, exiting)
        log("ee-roll     rolled in under load")
        log(f"            {len(measure)} requests to the original, to ours without exits and with exits, in turns")
        arms = measured_in_turns(original, recorder, run.plan, config, folder / "arms", folder / "arms-records",
                                 measure)
    return LoopResult(recording, load.replies, arms, n_records, record_bytes, report, recorder, exiting)


def _wait_for_records(records: Path, n_expected: int, limit_s: float = 60.0) -> int:
    """Wait until the last shard is sealed; return the number of records."""
    deadline = time.monotonic() + limit_s
    found = -1
    while time.monotonic() < deadline and found < n_expected:
        time.sleep(1)
        found = sum(len(read_shard(shard, [])) for shard in list_shards(records))
    return found
