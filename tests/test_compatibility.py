"""Archives, plans, records and monitor states that the code of the last release made still work."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from early_exit.archiver.packaging.archive import ArchiveRequest
from early_exit.archiver.packaging.describe import describe
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.watch.status import look
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.errors import RecordError
from early_exit.handler.exits.plan import load_plan
from early_exit.handler.monitor.shared_state import monitor_file, read_state
from early_exit.handler.recording.format import list_shards, read_header, read_shard
from early_exit.training.data.replay import Replay
from early_exit.training.data.shards import find_shards
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.support.client import failed, send
from tests.support.digits import batches, traffic
from tests.support.last_release import LastRelease, made_by_last_release
from tests.support.recording import record
from tests.support.rewritten import rewritten
from tests.support.served import served_model
from tests.support.untried import build_untried
from tests.support.waiting import wait_until
from tests.support.workers import wait_until_ready

ROOT = Path(__file__).parents[1]
OUR_CODE = "early_exit/handler/"
OPTIONS = TrainingOptions(tolerance=0.3, measure="flops", search=None, layers=2, recipe=Distillation(epochs=2))


@pytest.fixture(scope="module")
def old(digits_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> LastRelease:
    return made_by_last_release(digits_mar, tmp_path_factory.mktemp("last-release"))


@pytest.fixture(scope="module")
def repackaged(old: LastRelease, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the old archive with exits and its old plan, repackaged by this version as digits 4.0."""
    return build_untried(ArchiveRequest(str(old.exiting), tmp_path_factory.mktemp("store"), plan=old.plan))


def entries(mar: Path) -> set[str]:
    with zipfile.ZipFile(mar) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_an_old_archive_is_repackaged_with_the_code_of_this_version_and_none_of_the_old(
        old: LastRelease, repackaged: Path) -> None:
    ours = {f"early_exit/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "handler").rglob("*.py")}
    before, after = entries(old.exiting), entries(repackaged)
    assert {name for name in after if name.startswith(OUR_CODE)} == ours
    assert {name for name in before if name.startswith(OUR_CODE)} - ours, "the old layout was another"
    old_sample = {"early_exit/sample-request"}
    kept_now = {"early_exit/samples.json", "early_exit/probe.safetensors", "early_exit/handler.json"}
    assert {name for name in before - after if not name.startswith(OUR_CODE)} == old_sample
    assert {name for name in after - before if not name.startswith(OUR_CODE)} == kept_now


def test_a_repackaged_archive_has_the_old_backbone_plan_and_answers(old: LastRelease, repackaged: Path) -> None:
    before, after = describe(old.exiting), describe(repackaged)
    assert after["version"] == "4.0"
    assert after["backbone"]["sha256"] == before["backbone"]["sha256"]
    assert read_archive(repackaged).plan == load_plan(old.plan)[0] == read_archive(old.exiting).plan
    answers = load_file(old.answers)
    for mar in (repackaged, old.exiting):
        with torch.no_grad():
            outputs = served_model(mar)(answers["inputs"])
        torch.testing.assert_close(outputs, answers["outputs"], rtol=1e-5, atol=1e-5)


def test_an_old_archive_with_exits_is_repackaged_without_them(old: LastRelease, tmp_path: Path) -> None:
    plain = build_untried(ArchiveRequest(str(old.exiting), tmp_path))
    assert describe(plain)["plan"] is None
    assert describe(plain)["backbone"]["sha256"] == describe(old.exiting)["backbone"]["sha256"]


@pytest.mark.parametrize("how", [None, Replay(rounds=0)], ids=["as recorded", "replayed"])
def test_old_records_train_heads_and_certify_nothing(old: LastRelease, tmp_path: Path, how: Replay | None) -> None:
    archive = ArchiveLayout(tmp_path / "archive")
    archive.root.mkdir()
    extract(old.recorder, archive.root)
    description = read_archive(old.recorder).description
    shards = find_shards(old.records, "digits", description)
    assert sum(len(read_shard(shard, [], kept=True).kept or ()) for shard in shards) == 320
    options = replace(OPTIONS, replay=how)
    with pytest.raises(RecordError, match="320 more records .* their contents are not known: an earlier version"):
        train("digits", archive, shards, options, RunPaths(tmp_path / "alone"))
    requests = traffic(320, seed=71)
    record(load_backbone(archive.folder), next(batches(requests, 320)), tmp_path / "new", name="digits",
           first_request=1000, bodies=[request.body for request in requests])
    both = [*shards, *find_shards(tmp_path / "new", "digits", description)]
    run = RunPaths(tmp_path / "run")
    report = train("digits", archive, both, options, run)
    assert len(report.heads) == 2 and sum(report.records.values()) == 640
    assert report.records["tune"] + report.records["certify"] < 320, "of the new ones only"
    plan, _ = load_plan(run.plan)
    assert plan.backbone == description.sha256 and plan.certificate is not None
    build_untried(ArchiveRequest(str(old.recorder), tmp_path / "store", plan=run.plan))


def test_the_alarm_of_an_old_worker_is_found_and_counts(old: LastRelease) -> None:
    """The name of the state contains the digest of the plan, as the old version computed it."""
    plan, _ = load_plan(old.plan)
    state = read_state(monitor_file(old.records / "digits" / plan.backbone, "3.0", plan))
    assert state is not None and len(state.alarms) == 1
    assert (state.step, state.evidence.n) == (1, 7) and state.alarms[0].step == 0


@pytest.mark.slow
def test_a_server_takes_an_old_archive_with_its_own_code_and_rolls_to_the_repackaged_one(
        old: LastRelease, repackaged: Path, tmp_path: Path) -> None:
    bodies = [request.body for request in traffic(40, seed=81)]
    store, records = tmp_path / "store", tmp_path / "records"
    store.mkdir()
    # With this change, the log tells whether the archive's code runs or the installed code.
    rewritten(old.exiting, store / old.exiting.name,
              **{f"{OUR_CODE}watchman.py": lambda text: f"{text}\nlogger.warning('this is the code of the archive')\n"})
    shutil.copy(repackaged, store)
    with TorchServe(store, tmp_path / "state", Addresses.free(), records=records, models=[old.exiting.name]) as server:
        wait_until_ready(server)
        before = send(server, "digits", bodies)
        assert failed(before) == 0 and {reply.version for reply in before} == {"3.0"}
        assert {reply.exit for reply in before} - {"full"}, "some leave early"
        logs = [log.read_text() for log in (server.state / "logs").glob("*.log")]
        assert any("this is the code of the archive" in log for log in logs)
        management = Management(server.addresses, server.key_file, server.secret_file)
        wait_until(lambda: look(management, "digits", store, [str(records)], tmp_path / "cache").n_watched > 0,
                   "the monitor's state does not appear", limit_s=30, every_s=0.5)
        assert roll(management, store / repackaged.name, longest_batch_s=1).replaced == "3.0"
        after = send(server, "digits", bodies)
    assert failed(after) == 0 and {reply.version for reply in after} == {"4.0"}
    assert [(reply.top(), reply.exit) for reply in after] == [(reply.top(), reply.exit) for reply in before]
    shards = list_shards(records)
    assert {read_header(shard).version for shard in shards} >= {"3.0"}
    assert sum(len(read_shard(shard, [])) for shard in shards) > 0
