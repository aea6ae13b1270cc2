"""The loop of the product against a real server: record, train, repackage, roll, measure."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from tests.support.client import BackgroundLoad, Reply, send
from tests.support.workers import resident_mb


@dataclass(frozen=True)
class LoopResult:
    """What the loop did; `before` and `after` are in the order of the measured bodies."""

    recording: list[Reply]
    before: list[Reply]
    """From the user's original archive."""
    rolling: list[Reply]
    """While the version with exits was rolled in."""
    after: list[Reply]
    """From the version with exits."""
    worker_cpu_s_before: float
    """CPU seconds of the worker per request while `before` was answered, pre- and post-processing included."""
    worker_cpu_s_after: float
    worker_mb_before: float
    """Resident size of the worker when it had answered `before`."""
    worker_mb_after: float
    n_records: int
    record_bytes: int
    report: RunReport
    recorder: Path
    """The archive that records and answers in full."""
    exiting: Path
    """The archive with exits."""

    @property
    def replies(self) -> list[Reply]:
        return [*self.recording, *self.before, *self.rolling, *self.after]

    def hits(self) -> dict[str, float]:
        """Return the share of `after` that left at each exit, in the order of the backbone."""
        taken = Counter(reply.exit for reply in self.after)
        return {name: taken[name] / len(self.after) for name in (*(one.layer for one in self.report.exits), FULL_NAME)}

    def accuracy(self, replies: Sequence[Reply], labels: Sequence[str]) -> float:
        """Return the share of replies whose likeliest class is the label."""
        return sum(reply.ok and reply.top() == label for reply, label in zip(replies, labels)) / len(labels)

    @property
    def disagreement(self) -> float:
        """Share of the measured requests that the two versions answer differently."""
        pairs = [(one.top(), other.top()) for one, other in zip(self.before, self.after) if one.ok and other.ok]
        return sum(one != other for one, other in pairs) / len(pairs)


def run_loop(original: Path, folder: Path, record: Sequence[bytes], measure: Sequence[bytes], *,
             input_shape: tuple[int, ...], options: TrainingOptions,
             log: Callable[[str], None] = print) -> LoopResult:
    """Run the whole loop with an original archive and stop the server, also when a step fails.

    Args:
        original: a .mar as a user has it.
        folder: for everything that is made.
        record: request bodies to record and train on.
        measure: request bodies to measure before and after with.
        input_shape: of the model, for `ee-archive`.
        options: for `ee-train`.
        log: told about each step.
    """
    store, records = folder / "model-store", folder / "records"
    store.mkdir(parents=True)
    shutil.copy(original, store)
    server = TorchServe(store, folder / "state", Addresses.free(), records=records, models=[original.name])
    with server:
        management = Management(server.addresses, server.key_file, server.secret_file)
        log(f"ee-serve    TorchServe with the original model at {server.addresses.inference}")
        name = original.stem
        before, cpu_before, mb_before = _measured(server, name, measure)
        log(f"            {len(measure)} requests measured before")
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
        log("ee-roll     rolled in under load; measuring the same requests again")
        after, cpu_after, mb_after = _measured(server, name, measure)
    return LoopResult(recording, before, load.replies, after, cpu_before, cpu_after, mb_before, mb_after,
                      n_records, record_bytes, report, recorder, exiting)


def _measured(server: TorchServe, model: str, bodies: Sequence[bytes]) -> tuple[list[Reply], float, float]:
    """Send bodies; return the replies, the workers' CPU seconds per request and their resident MB."""
    send(server, model, bodies[:50])  # the first batches fill caches
    started = _worker_cpu_s(server)
    replies = send(server, model, bodies)
    cpu_s = (_worker_cpu_s(server) - started) / len(bodies)
    return replies, cpu_s, resident_mb(server)


def _worker_cpu_s(server: TorchServe) -> float:
    times = [worker.cpu_times() for worker in server.workers()]
    return sum(one.user + one.system for one in times)


def _wait_for_records(records: Path, n_expected: int, limit_s: float = 60.0) -> int:
    """Wait until the last shard is sealed; return how many records there are."""
    deadline = time.monotonic() + limit_s
    found = -1
    while time.monotonic() < deadline and found < n_expected:
        time.sleep(1)
        found = sum(len(read_shard(shard, [])) for shard in list_shards(records))
    return found
