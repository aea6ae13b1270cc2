"""From recorded requests to a certified int8 model with exits: the commands of the page on engines, and a real
TorchServe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import ENGINES, INT8
from early_exit.handler.errors import ArchiveError, PlanError, RecordError
from early_exit.handler.exits.plan import load_plan
from early_exit.handler.recording.format import list_shards, read_header, read_shard
from early_exit.training.data.preprocessing import preprocessing
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.support import documents
from tests.support.client import failed, send
from tests.support.digits import measured_traffic, recorded_traffic
from tests.support.reader import Reader
from tests.support.recording import prepared, record
from tests.support.sources import ids_in
from tests.support.untried import build_untried
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

TOLERANCE = 0.05
CONFIG = ("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 20\n"
          "early_exit:\n  seal_after_s: 1\n  sampling_rate: 1\n  control_rate: 0\n")


@pytest.fixture(scope="module", autouse=True)
def openvino() -> None:
    """The servers of this module use it, so that it is not hidden from them."""


def test_int8_is_made_from_recorded_requests_or_not_at_all(recorder_mar: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="made from recorded requests: pass --calibrate RECORDS"):
        build_archive(ArchiveRequest(str(recorder_mar), tmp_path, engine=INT8))
    assert not list(tmp_path.glob("*.mar"))


def test_exits_on_int8_keep_one_promise_together_through_torchserve(recorder_mar: Path, tmp_path: Path) -> None:
    store, config = tmp_path / "model-store", tmp_path / "config.yaml"
    config.write_text(CONFIG)
    made = build_untried(ArchiveRequest(str(recorder_mar), store, version="2.0", config=config))
    recorder = unpacked(made, tmp_path / "recorder")
    original = json.loads(recorder.original_manifest.read_text())
    requests, parts = recorded_traffic(1200, seed=50)
    bodies = [one.body for one in requests]
    with preprocessing(recorder.root, original) as handler:
        backbone = load_backbone(recorder.folder)
        [inputs] = prepared(handler, bodies, backbone.description)
        record(backbone, inputs, tmp_path / "records", name="digits", ids=ids_in(parts), bodies=bodies)
    reader = Reader(documents.ENGINES, folder=tmp_path, instead={"cifar": "digits"},
                    more={"ee-train": f"--tolerance {TOLERANCE} --search none --layers 3 --cost flops --replay 1"})
    reader.check("ee-archive model-store/cifar-2.0.mar --engine openvino-int8")
    layout = unpacked(store / "digits-4.0.mar", tmp_path / "int8")
    engine = ENGINES[INT8].identity(layout.folder)
    options = TrainingOptions(tolerance=TOLERANCE, measure="flops", layers=3, search=None, engine=engine)
    with pytest.raises(RecordError, match="executed by openvino-int8@.*, but folded made the records"):
        train("digits", layout, list_shards(tmp_path / "records"), options, RunPaths(tmp_path / "without"))
    reader.check("ee-train records")
    file = RunPaths(tmp_path / "runs" / "int8").plan
    plan, _ = load_plan(file)
    assert plan.engine == engine and plan.exits and plan.certificate is not None
    with pytest.raises(PlanError, match="made on the engine openvino-int8@.* executed by folded"):
        build_archive(ArchiveRequest(str(made), tmp_path, plan=file))
    reader.check("ee-archive model-store/cifar-4.0.mar --plan")
    reader.at_the_end()

    fresh = measured_traffic(300, seed=51)
    with TorchServe(store, tmp_path / "state", Addresses.free(), records=tmp_path / "served",
                    models=["digits-5.0.mar"]) as server:
        replies = send(server, "digits", [one.body for one in fresh])
        assert failed(replies) == 0
        wait_until(lambda: list_shards(tmp_path / "served"), "no records", limit_s=20, every_s=0.2)
    assert any(reply.exit != "full" for reply in replies)
    with preprocessing(recorder.root, original) as handler:
        [inputs] = prepared(handler, [one.body for one in fresh], backbone.description)
        expected = backbone.graph(inputs).argmax(dim=1)
    differs = sum(reply.top() != str(label) for reply, label in zip(replies, expected.tolist()))
    assert differs / len(fresh) < 2 * TOLERANCE
    [served] = list_shards(tmp_path / "served")[:1]
    assert read_header(served).engine == engine
    columns = read_shard(served, [])
    assert (columns.backbone_class == columns.full_class).double().mean() > 0.9


def unpacked(mar: Path, folder: Path) -> ArchiveLayout:
    folder.mkdir()
    extract(mar, folder)
    return ArchiveLayout(folder)
