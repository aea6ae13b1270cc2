"""From recorded requests to a certified model in 8-bit integers with exits, served by a real TorchServe."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from early_exit.archiver.addresses import Addresses
from early_exit.archiver.archive import ArchiveRequest, build_archive
from early_exit.archiver.inspect import describe
from early_exit.archiver.server import TorchServe
from early_exit.handler.backbone import Backbone
from early_exit.handler.engine import ENGINES, INT8
from early_exit.handler.errors import ArchiveError, PlanError, RecordError
from early_exit.handler.layout import ArchiveLayout, extract
from early_exit.handler.records import list_shards, read_header, read_shard
from early_exit.training.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.replay import Replay
from early_exit.training.requests import preprocessing
from tests.support.client import failed, send
from tests.support.digits import traffic
from tests.support.recording import record

pytestmark = pytest.mark.slow

TOLERANCE = 0.05
CONFIG = ("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 20\n"
          "early_exit:\n  engine: openvino-int8\n  seal_after_s: 1\n  sampling_rate: 1\n  control_rate: 0\n")


@pytest.fixture(scope="module")
def recorder(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> ArchiveLayout:
    layout = ArchiveLayout(tmp_path_factory.mktemp("recorder"))
    extract(recorder_mar, layout.root)
    return layout


@pytest.fixture(scope="module")
def records(recorder: ArchiveLayout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests with their bytes, as the engine folded recorded them."""
    folder = tmp_path_factory.mktemp("records")
    bodies = [one.body for one in traffic(1200, seed=50)]
    with preprocessing(recorder.root, json.loads(recorder.original_manifest.read_text())) as handler:
        record(Backbone.load(recorder.folder), handler.model_input(bodies), folder, name="digits", bodies=bodies)
    return folder


@pytest.fixture(scope="module")
def int8_mar(recorder_mar: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    return build_archive(ArchiveRequest(str(recorder_mar), folder, config=config, engine=INT8, calibrate=records))


def test_int8_is_made_from_recorded_requests_or_not_at_all(recorder_mar: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="made from recorded requests: pass --calibrate RECORDS"):
        build_archive(ArchiveRequest(str(recorder_mar), tmp_path, engine=INT8))
    assert not list(tmp_path.glob("*.mar"))


def test_exits_on_int8_keep_one_promise_together_through_torchserve(
        int8_mar: Path, recorder: ArchiveLayout, recorder_mar: Path, records: Path, tmp_path: Path) -> None:
    layout = ArchiveLayout(tmp_path / "unpacked")
    layout.root.mkdir()
    extract(int8_mar, layout.root)
    engine = ENGINES[INT8].identity(layout.folder)
    assert describe(int8_mar)["engine"] == INT8
    shards = list_shards(records)
    options = TrainingOptions(tolerance=TOLERANCE, measure="flops", layers=3, search=None, engine=engine,
                              recipe=Distillation(epochs=5))
    with pytest.raises(RecordError, match="executed by openvino-int8@.*, but folded made the records"):
        train("digits", layout, shards, options, RunPaths(tmp_path / "without"))
    report = train("digits", layout, shards, TrainingOptions(
        tolerance=TOLERANCE, measure="flops", layers=3, search=None, engine=engine, recipe=Distillation(epochs=5),
        replay=Replay(rounds=0)), RunPaths(tmp_path / "run"))
    assert report.plan.engine == engine and report.plan.exits and report.plan.certificate is not None
    plan = tmp_path / "run" / "plan.json"
    with pytest.raises(PlanError, match="made on the engine openvino-int8@.* executed by folded"):
        build_archive(ArchiveRequest(str(recorder_mar), tmp_path, plan=plan))

    exiting = build_archive(ArchiveRequest(str(int8_mar), tmp_path / "store", plan=plan))
    fresh = traffic(300, seed=51)
    with TorchServe(tmp_path / "store", tmp_path / "state", Addresses.free(), records=tmp_path / "served",
                    models=[exiting.name]) as server:
        replies = send(server, "digits", [one.body for one in fresh])
        assert failed(replies) == 0
        time.sleep(3)
    assert any(reply.exit != "full" for reply in replies)
    with preprocessing(recorder.root, json.loads(recorder.original_manifest.read_text())) as handler:
        expected = Backbone.load(recorder.folder).graph(handler.model_input([one.body for one in fresh])).argmax(dim=1)
    differs = sum(reply.top() != str(label) for reply, label in zip(replies, expected.tolist()))
    assert differs / len(fresh) < 2 * TOLERANCE
    [served] = list_shards(tmp_path / "served")[:1]
    assert read_header(served).engine == engine
    columns = read_shard(served, [])
    assert (columns.backbone_class == columns.full_class).double().mean() > 0.9
