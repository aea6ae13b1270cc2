"""Files of other versions: format numbers follow the rule, and every reader refuses newer files with their names."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from early_exit.archiver.packaging.cli import main as ee_archive
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.errors import FormatError
from early_exit.handler.formats import (
    ANSWERS,
    BACKBONE,
    FORMATS,
    HANDLER,
    MONITOR_STATE,
    PLAN,
    RECORDS,
    SAMPLES,
    FileFormat,
)
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.sequential_test import MonitorState
from early_exit.handler.monitor.shared_state import SharedMonitor, read_state
from early_exit.handler.recording.format import list_shards, read_header, read_shard, read_times
from early_exit.training.cli import main as ee_train
from tests.support.digits import batches, traffic
from tests.support.plans import write_plan
from tests.support.recording import record
from tests.support.rewritten import rewritten
from tests.support.shadow_samples import samples_of

ROOT = Path(__file__).parents[1]
RELEASES = {
    "0.1.0": {BACKBONE.kind: 2, PLAN.kind: 1, RECORDS.kind: 2, MONITOR_STATE.kind: 1},
    "0.2.0": {BACKBONE.kind: 3, HANDLER.kind: 1, SAMPLES.kind: 1, ANSWERS.kind: 1, PLAN.kind: 1, RECORDS.kind: 3,
              MONITOR_STATE.kind: 2},
}
"""The format numbers that each version writes, oldest first. The last row is the version of this code, which may not be
released yet. To raise the version, add a row, and set `released` in the code to the row before it."""
NEWER = 999


@pytest.mark.parametrize("file_format", FORMATS, ids=lambda file_format: file_format.kind)
def test_a_number_rises_at_most_once_per_release_and_both_are_read(file_format: FileFormat) -> None:
    last, this = list(RELEASES.values())[-2:]
    assert file_format.released == last.get(file_format.kind, 1), "the last release wrote another number"
    assert file_format.written == this[file_format.kind], "the row of this version says another number"
    assert file_format.written - file_format.released in (0, 1), "the number rose more than once since the last release"
    for number in {file_format.released, file_format.written}:
        file_format.require({"format": number}, "a file")
        file_format.require({"format": str(number)}, "a file")  # safetensors metadata holds strings


def test_every_version_has_its_row() -> None:
    [version] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version == list(RELEASES)[-1], "add the numbers of the new version, and set `released` in handler/formats.py"


def test_no_file_carries_a_number_that_the_rule_does_not_see() -> None:
    """Only one module writes and reads the key `format` of any file."""
    named = {str(file.relative_to(ROOT)) for package in ("handler", "training", "archiver")
             for file in (ROOT / package).rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))
             if isinstance(node, ast.Constant) and node.value == "format"}
    assert named == {"handler/formats.py"}


@pytest.mark.parametrize(("content", "message"), [
    ({"format": 3}, r"x\.json is an exit plan of format 3, this version reads 1 and 2: .* or a newer one"),
    ({"format": 0}, r"x\.json is an exit plan of format 0, this version reads 1 and 2: ee-train again, or .* wrote it"),
    ({}, r"x\.json has no format number, where an exit plan was expected"),
    (None, "no format number"), ([], "no format number"), ({"format": "two"}, "no format number"),
])
def test_a_refusal_tells_the_file_what_was_found_what_is_read_and_what_to_do(content: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FileFormat("an exit plan", released=1, written=2, renewal="ee-train again").require(content, "x.json")


@pytest.fixture(scope="module")
def records(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one shard of digits and their bodies, which has the format number of a newer version."""
    folder = tmp_path_factory.mktemp("records")
    layout = ArchiveLayout(tmp_path_factory.mktemp("recorder"))
    extract(recorder_mar, layout.root)
    requests = traffic(64, seed=70)
    record(load_backbone(layout.folder), next(batches(requests, 64)), folder, name="digits",
           bodies=[request.body for request in requests])
    [shard] = list_shards(folder)
    with safe_open(shard, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(shard), shard, {**metadata, "format": str(NEWER)})
    return folder


def test_a_newer_shard_is_refused_by_name_however_it_is_read(records: Path) -> None:
    [shard] = list_shards(records)
    for read in (read_header, read_times, lambda path: read_shard(path, []),
                 lambda path: read_shard(path, [], kept=True)):
        with pytest.raises(FormatError, match=f"{shard.name} is a record shard of format {NEWER}, this version reads"):
            read(shard)


@pytest.mark.parametrize("how", [[], ["--replay"]], ids=["as recorded", "replayed"])
def test_ee_train_refuses_newer_records_by_name(
        records: Path, recorder_mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: list[str]) -> None:
    run = tmp_path / "run"
    assert ee_train([str(records), "--archive", str(recorder_mar), "--to", str(run), *how]) == 1
    _refused(capsys, list_shards(records)[0], RECORDS)
    assert not (run / "run.json").exists()


def test_ee_archive_refuses_to_quantize_with_newer_records(
        records: Path, recorder_mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ee_archive([str(recorder_mar), "--engine", "openvino-int8", "--calibrate", str(records),
                       "--to", str(tmp_path / "store")]) == 1
    _refused(capsys, list_shards(records)[0], RECORDS)
    assert not list((tmp_path / "store").glob("*"))


def test_ee_archive_refuses_a_newer_plan_by_name(
        recorder_mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_plan(tmp_path / "run", recorder_mar)
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "format": NEWER}))
    assert ee_archive([str(recorder_mar), "--plan", str(plan), "--to", str(tmp_path / "store")]) == 1
    _refused(capsys, plan, PLAN)


def test_ee_train_refuses_a_newer_archive_by_name(
        records: Path, recorder_mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = rewritten(recorder_mar, tmp_path / "newer.mar", **{"early_exit/backbone.json": lambda text: json.dumps(
        {**json.loads(text), "format": NEWER})})
    assert ee_train([str(records), "--archive", str(newer), "--to", str(tmp_path / "run")]) == 1
    _refused(capsys, f"{newer}: early_exit/backbone.json", BACKBONE)
    with pytest.raises(FormatError, match=r"newer\.mar"):
        read_archive(newer)


def test_a_newer_state_of_a_monitor_is_refused_by_name_and_never_replaced(tmp_path: Path) -> None:
    """The state may hold an alarm, and a worker that cannot read the state must not delete it."""
    path = tmp_path / "monitor-1.0.json"
    path.write_text(json.dumps({**MonitorState().to_json(), "format": NEWER, "alarms": ["of another kind"]}))
    before = path.read_bytes()
    with pytest.raises(FormatError, match=rf"{path.name} is the state of a monitor of format {NEWER}"):
        read_state(path)
    worker = SharedMonitor(Monitored("disagreement", 0.02, 0.05), 2, path)
    worker.note(samples_of([1.0] * 20))
    worker.close()
    assert path.read_bytes() == before
    assert worker.state.step == 2, "no request leaves early"


def _refused(capsys: pytest.CaptureFixture[str], file: Path | str, file_format: FileFormat) -> None:
    readable = " and ".join(map(str, file_format.readable))
    assert (f"{file} is {file_format.kind} of format {NEWER}, this version reads {readable}: use the version of "
            "early-exit-torchserve that wrote it, or a newer one") in capsys.readouterr().err
