"""Records that a real server writes under trouble train and certify the same plan as records without trouble."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.call import Call
from early_exit.handler.recording.content import KEY_FILE
from early_exit.handler.recording.format import COLUMNS, Records, list_shards, read_header, read_shard, request_hash
from early_exit.handler.sample_request import OCTETS, headers_with
from early_exit.handler.serving.worker import Worker
from early_exit.training.data.dataset import NOT_FINITE, load_traffic
from early_exit.training.data.preprocessing import importing_from
from early_exit.training.data.shards import find_shards, of_traffic, readable_shards, times_of
from early_exit.training.data.traffic import traffic_in
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.report.summary import RunReport
from tests.support.client import metrics
from tests.support.host import MemoryHost
from tests.support.models.spread_model import spread_model
from tests.support.remembering_client import Client
from tests.support.skips import MAY_NOT_MOUNT
from tests.support.untried import build_untried
from tests.support.waiting import wait_until
from tests.support.workers import kill_worker, wait_until_ready

pytestmark = pytest.mark.slow

MODEL = "spread"
HANDLER = Path(__file__).parents[1] / "support" / "models" / "spread_handler.py"
N_REQUESTS, N_AFTER, PER_SHARD = 3000, 1500, 64
"""The number of requests before the preprocessing changes, and after it, and the records of a shard."""
DAY = 86400.0
CONFIG = ("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\nearly_exit:\n  control_rate: 0\n  seal_after_s: 1\n"
          f"  records_per_shard: {PER_SHARD}\n  keep_requests: true\n")
OPTIONS = TrainingOptions(tolerance=0.15, measure="flops", search=None, recipe=Distillation(epochs=6))
BAD = [[0.0] * 16, [math.nan] * 16, [math.inf, *[1.0] * 15]]


def archive(folder: Path, version: str, handler: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    save_file(spread_model().state_dict(), folder / "weights.safetensors")
    (folder / "config.yaml").write_text(CONFIG)
    return build_untried(ArchiveRequest(
        "tests.support.models.spread_model:spread_model", folder.parent / "store", model_name=MODEL, version=version,
        weights=folder / "weights.safetensors", input_shape=(16,), handler=str(handler), config=folder / "config.yaml",
        extra_files=[HANDLER.with_name("spread_model.py")]))


@dataclass(frozen=True)
class Troubled:
    """A server's records after every kind of trouble that these tests cover."""

    archives: tuple[Path, Path]
    records: Path
    sent: tuple[dict[str, str], dict[str, str]]
    """The bodies that were sent to each of the two archives. Keys are request ids."""
    lost: set[str]
    """The requests whose records the killed worker had not written."""
    times: tuple[float, float]
    """The Unix times at which the requests began and ended."""
    log: str
    not_finite: float


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troubled]:
    root = tmp_path_factory.mktemp("evidence")
    changed = root / "changed" / HANDLER.name
    changed.parent.mkdir()
    changed.write_text(HANDLER.read_text().replace("_SCALE = 1.0", "_SCALE = -1.0"))
    archives = archive(root / "first", "1.0", HANDLER), archive(root / "second", "2.0", changed)
    rows = (2 * torch.randn(N_REQUESTS + N_AFTER, 16, generator=torch.Generator().manual_seed(5))).tolist()
    records = root / "records"
    (records / MODEL).mkdir(parents=True, mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(records / MODEL)],
                      capture_output=True, check=False).returncode:
        pytest.skip(MAY_NOT_MOUNT)
    try:
        with TorchServe(root / "store", root / "state", Addresses.free(), records=records,
                        models=[archives[0].name]) as server:
            wait_until_ready(server, MODEL)
            client = Client(server, MODEL)
            began = time.time()
            at_risk = _first_half(client, rows[:N_REQUESTS], records / MODEL)
            management = Management(server.addresses, server.key_file, server.secret_file)
            time.sleep(3)  # until the last records are sealed: a worker that is removed writes no more
            roll(management, archives[1], longest_batch_s=1)
            first, client.sent = client.sent, {}
            client.send(rows[N_REQUESTS:])
            time.sleep(4)  # until the last records are sealed
            not_finite = sum(float(line.split()[-1]) for line in metrics(server).splitlines()
                             if "records_not_finite_total{" in line)
            log = "".join(file.read_text(errors="replace") for file in (server.state / "logs").glob("*.log"))
        lost = {name for name in at_risk if request_hash(name) not in _recorded(records)}
        yield Troubled(archives, records, (first, client.sent), lost, (began, time.time()), log, not_finite)
    finally:
        subprocess.run(["umount", "-l", str(records / MODEL)], check=True)


def _first_half(client: Client, rows: Sequence[object], folder: Path) -> list[str]:
    """Send the first half, with bad values, a clock that jumps, a disk that fills up and a worker that is killed.

    Returns:
        The ids of the requests that were answered just before the worker was killed.
    """
    client.send([*rows[:500], *BAD, *rows[500:1000]])
    client.send([{"clock": 40 * DAY}, *rows[1000:1000 + 2 * PER_SHARD]])
    time.sleep(2)  # so that the shards that are written meanwhile are judged by this clock
    client.send([{"clock": 0.0}, *rows[1000 + 2 * PER_SHARD:1500]])
    client.send([{"clock": -40 * DAY}, *rows[1500:1500 + PER_SHARD], {"clock": 0.0}, *rows[1500 + PER_SHARD:2000]])
    time.sleep(2)
    filler = folder / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"\0" * 2**16)
            file.flush()
    client.send(rows[2000:2000 + 2 * PER_SHARD])  # with the next shard, these are fewer than may wait
    time.sleep(2)
    filler.unlink()
    client.send(rows[2000 + 2 * PER_SHARD:2500])
    time.sleep(8)  # until the records that waited for room are written
    n_before = len(client.sent)
    client.send(rows[2500:2500 + PER_SHARD // 2])
    at_risk = [*client.sent][n_before:]
    kill_worker(client.server)
    backbone = next(path for path in folder.iterdir() if path.is_dir())
    (backbone / ".1.0-1-1-0.safetensors.k3j4h5.writing").write_bytes(b"half a shard")
    whole = list_shards(folder)[0]
    (backbone / "1.0-1-1-0.safetensors").write_bytes(whole.read_bytes()[:-40])
    (backbone / "1.0-1-1-1.safetensors").write_bytes(b"")
    (backbone / "notes.safetensors").write_bytes(b"a file of somebody else")
    wait_until(lambda: _answers(client), "the next worker: not within a minute", every_s=0.5)
    client.send(rows[2500 + PER_SHARD // 2:])
    return at_risk


def _answers(client: Client) -> bool:
    before = len(client.sent)
    client.send([[float(number) for number in range(16)]], may_fail=True)
    return len(client.sent) > before


def _recorded(records: Path) -> set[int]:
    """Return the hashes of the recorded requests."""
    shards = readable_shards(list_shards(records), lambda line: None)
    return {request for shard in shards for request in read_shard(shard, []).request.tolist()}


@dataclass(frozen=True)
class Compared:
    """The shards of one archive's traffic, and the shards of the same requests without trouble."""

    layout: ArchiveLayout
    troubled: list[Path]
    untroubled: list[Path]
    lines: list[str]
    """The lines that were logged about the shards."""


@pytest.fixture(scope="module", params=[0, 1], ids=["before the change", "after it"])
def compared(request: pytest.FixtureRequest, troubled: Troubled, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    half: int = request.param
    folder, mar = tmp_path_factory.mktemp("compared"), troubled.archives[half]
    layout, lines = ArchiveLayout(folder / "unpacked"), list[str]()
    layout.root.mkdir()
    extract(mar, layout.root)
    backbone = read_archive(mar).description
    shards = readable_shards(find_shards(troubled.records, MODEL, backbone), lines.append)
    shards = of_traffic(shards, traffic_in(layout, backbone), lines.append)
    sent = {name: body for name, body in troubled.sent[half].items() if name not in troubled.lost}
    return Compared(layout, shards, untroubled(layout, sent, folder / "records", troubled.records / KEY_FILE), lines)


def untroubled(layout: ArchiveLayout, sent: dict[str, str], folder: Path, key: Path) -> list[Path]:
    """Record the same requests without a server and without trouble; return the shards."""
    folder.mkdir(mode=0o700)
    shutil.copy(key, folder)
    settings = {"early_exit": {"records": str(folder), "control_rate": 0, "records_per_shard": 10_000,
                               "keep_requests": True}}
    with working_in(layout.root):
        worker = Worker.load(layout.root, MemoryHost(MODEL, folder=str(layout.root), batch_size=1,
                                                     model_config=settings))
        for name, body in sent.items():
            worker.step([Call(name, {"body": bytearray(body.encode())}, headers_with({"body": OCTETS}))])
        worker.close()
    return list_shards(folder)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        with importing_from(folder):
            yield
    finally:
        os.chdir(before)


def records_of(shards: Sequence[Path]) -> Records:
    """Return all records in the order of their requests' hashes."""
    layers = read_header(shards[0]).layers
    records = Records.concatenate([read_shard(shard, layers, kept=True) for shard in shards])
    order = records.request.argsort()
    return Records(
        activations={layer: values[order] for layer, values in records.activations.items()},
        kept=[(records.kept or [])[row] for row in order.tolist()],
        **{name: getattr(records, name)[order] for name in COLUMNS})


def test_everything_is_recorded_as_without_trouble_but_what_has_no_values(compared: Compared) -> None:
    found, expected = records_of(compared.troubled), records_of(compared.untroubled)
    assert torch.equal(found.request, expected.request), "the same requests, each once"
    assert found.kept == expected.kept
    for name in set(COLUMNS) - {"sequence", "time"}:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert len(found.content.unique()) == len(set(found.kept or ())), "equal where the requests are, and nowhere else"
    for layer, values in expected.activations.items():
        assert torch.equal(found.activations[layer], values), layer
        assert bool(values.isfinite().all())


def test_what_has_no_values_is_counted_and_said(troubled: Troubled) -> None:
    assert troubled.not_finite == len(BAD)
    assert "scores that are not finite and predict no class" in troubled.log
    bad = {json.dumps(row) for row in BAD}
    sent = {name for name, body in troubled.sent[0].items() if body in bad}
    assert len(sent) == len(BAD) and not {request_hash(name) for name in sent} & _recorded(troubled.records)


def test_nothing_is_lost_but_what_the_killed_worker_had_not_written(troubled: Troubled) -> None:
    recorded = _recorded(troubled.records)
    sent = {name: body for half in troubled.sent for name, body in half.items()}
    bad = {json.dumps(row) for row in BAD}
    assert {name for name, body in sent.items() if request_hash(name) not in recorded and body not in bad
            } == troubled.lost
    assert (troubled.records / KEY_FILE).stat().st_mode & 0o777 == 0o600


def test_the_full_disk_was_told_and_cost_nothing(troubled: Troubled) -> None:
    assert "cannot write records" in troubled.log and "are written to" in troubled.log
    assert "in which 0 records were dropped" in troubled.log


def test_times_are_those_of_a_clock_that_nobody_set(compared: Compared, troubled: Troubled) -> None:
    traffic = load_traffic(compared.troubled)
    began, ended = troubled.times
    assert began - 1 <= traffic.time.min().item() and traffic.time.max().item() <= ended + 1
    assert all(began - 1 <= time.max().item() <= ended + 1 for time in times_of(compared.troubled).values())


def test_files_that_are_no_shards_and_other_traffic_are_told(compared: Compared) -> None:
    told = "\n".join(compared.lines)
    assert told.count("It is skipped") == 3
    [line] = [line for line in compared.lines if "other traffic" in line]
    n_others = N_AFTER if read_header(compared.troubled[0]).version == "1.0" else N_REQUESTS
    assert int(line.split()[0]) >= n_others - PER_SHARD


def test_what_is_trained_and_certified_is_what_it_is_without_trouble(compared: Compared, tmp_path: Path) -> None:
    reports: dict[str, RunReport] = {}
    for how in ("troubled", "untroubled"):
        reports[how] = train(MODEL, compared.layout, getattr(compared, how), OPTIONS, RunPaths(tmp_path / how))
    found, expected = reports["troubled"], reports["untroubled"]
    assert found.records == expected.records
    is_first = read_header(compared.troubled[0]).version == "1.0"
    assert found.skipped == expected.skipped == ({NOT_FINITE: len(BAD)} if is_first else {})
    assert expected.plan.exits and expected.plan.certificate is not None
    assert found.plan == replace(expected.plan, certificate=found.plan.certificate)
    assert found.plan.certificate == replace(expected.plan.certificate, window=found.plan.certificate.window)
