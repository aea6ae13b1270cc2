"""Traffic is requests to one handler with one set of files; archives, plans and records of other traffic are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from early_exit.archiver.gateway.certificates import Promises
from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.describe import in_words
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.watch.cli import _certificate
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import MANIFEST, ArchiveLayout, extract
from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.exits.plan import Certificate, load_plan
from early_exit.handler.exits.risk import Risk
from early_exit.handler.recording.format import list_shards, read_header
from early_exit.handler.serving.worker import Worker
from early_exit.training.data.preprocessing import archived_config
from early_exit.training.data.shards import of_traffic
from early_exit.training.data.traffic import traffic_in, traffic_of
from tests.archiver.test_renewal import seen
from tests.support.host import MemoryHost
from tests.support.models.rows_model import rows_model
from tests.support.original import original_mar
from tests.support.plans import write_plan
from tests.support.rewritten import rewritten
from tests.support.untried import build_untried

CONFIG = "minWorkers: 1\nhandler: {scale: 2, 3: [a, b]}\n"
CERTIFICATE = Certificate(Risk.DISAGREEMENT, 0.02, 0.95, 1500, 19, 0.0127, 0.03, "fixed-sequence", (1.0, 2.0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's archive with a file beside its handler, and a configuration that has a name of its own."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    mar = original_mar(folder, "rows", "rows_model.py", "rows_model.py", rows_model().state_dict(), CONFIG)
    return rewritten(mar, folder / "source.mar", drop="model-config.yaml",
                     **{MANIFEST: lambda text: text.replace("model-config.yaml", "own.yaml"),
                        "own.yaml": CONFIG.encode(), "classes.txt": b"cat\ndog\n"})


def packed(source: Path, to: Path, version: str = "2.0", lines: list[str] | None = None, **more: object) -> Path:
    shape = None if is_ours(source) else (6,)
    asked = ArchiveRequest(str(source), to, version=version, input_shape=shape, **more)  # type: ignore[arg-type]
    return build_untried(asked, (lines if lines is not None else []).append)


def is_ours(mar: Path) -> bool:
    return any(name.startswith("early_exit/") for name in zipfile.ZipFile(mar).namelist())


@pytest.fixture(scope="module")
def first(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(source, tmp_path_factory.mktemp("first"))


def traffic(mar: Path) -> str:
    return traffic_of(read_archive(mar))


def unpacked(mar: Path, folder: Path) -> ArchiveLayout:
    folder.mkdir()
    extract(mar, folder)
    return ArchiveLayout(folder)


def worker_of(layout: ArchiveLayout, records: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.syspath_prepend(layout.root)
    config = archived_config(layout)
    config["early_exit"] = {**config.get("early_exit", {}), "records": str(records), "control_rate": 0}
    return Worker.load(layout.root, MemoryHost("rows", folder=str(layout.root), model_config=config))


def test_it_is_the_same_however_often_an_archive_is_made_of_it(first: Path, source: Path, tmp_path: Path) -> None:
    again = packed(source, tmp_path / "again", "7.0")
    of_ours = packed(first, tmp_path / "ours", "3.0")
    once_more = packed(of_ours, tmp_path / "more", "4.0", plan=write_plan(tmp_path / "plan", first))
    assert traffic(first) and {traffic(again), traffic(of_ours), traffic(once_more)} == {traffic(first)}
    layout = unpacked(once_more, tmp_path / "unpacked")
    assert traffic_in(layout, read_archive(once_more).description) == traffic(first)


@pytest.mark.parametrize("config", [
    "minWorkers: 4\nmaxWorkers: 4\nbatchSize: 8\nmaxBatchDelay: 5\nresponseTimeout: 60\ndeviceType: cpu\n"
    "handler: {3: [a, b], scale: 2}\nearly_exit: {pool: 2, keep_requests: true}\n"])
def test_neither_the_servers_settings_nor_ours_are_traffic(config: str, first: Path, source: Path,
                                                           tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(config)
    assert traffic(packed(source, tmp_path, config=tmp_path / "other.yaml")) == traffic(first)


CHANGES: dict[str, dict[str, bytes | Callable[[str], str]]] = {
    "code": {"rows_model.py": lambda text: text.replace("json.loads(item", "2 * json.loads(item")},
    "file": {"classes.txt": b"dog\ncat\n"},
    "another file": {"more.txt": b""},
    "a file beside the manifest": {"MAR-INF/scale.txt": b"2"},
    "configuration": {"own.yaml": CONFIG.replace("2", "3").encode()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_preprocessing_is_other_traffic(change: str, first: Path, source: Path, tmp_path: Path) -> None:
    other = packed(rewritten(source, tmp_path / "other.mar", **CHANGES[change]), tmp_path)
    assert read_archive(other).description.sha256 == read_archive(first).description.sha256
    assert traffic(other) not in ("", traffic(first))


def checkpoint(mean: float, to: Path) -> Path:
    """Save the weights of a model as users do who keep the mean of its preprocessing with them."""
    torch.manual_seed(0)
    torch.save({"state_dict": rows_model().state_dict(), "mean": mean}, to)
    return to


HANDLER = """
import os, torch
from rows_model import rows_model

class Handler:
    def initialize(self, context):
        saved = torch.load(os.path.join(context.system_properties["model_dir"], "weights.pth"), weights_only=True)
        self.mean, self.model = saved["mean"], rows_model().eval()
        self.model.load_state_dict(saved["state_dict"])

    def handle(self, data, context):
        rows = torch.tensor([item["body"] for item in data])
        with torch.no_grad():
            return self.model(rows - self.mean).argmax(dim=1).tolist()
"""


def test_a_checkpoint_that_the_handler_reads_itself_is_traffic(tmp_path: Path) -> None:
    """The mean of the preprocessing is beside the weights, which are the same."""
    made = []
    for mean in (0.0, 5.0):
        folder = tmp_path / str(mean)
        folder.mkdir()
        user = rewritten(original_mar(folder, "rows", "rows_model.py", "rows_model.py", rows_model().state_dict(),
                                      CONFIG), folder / "user.mar",
                         **{MANIFEST: lambda text: text.replace('"handler": "rows_model.py"', '"handler": "own.py"'),
                            "own.py": HANDLER.encode(),
                            "weights.pth": checkpoint(mean, folder / "checkpoint.pth").read_bytes()})
        (folder / "request.json").write_text("[0.1, 0.2, 0.3, -0.4, 0.5, 1.5]")
        first = build_archive(ArchiveRequest(str(user), folder / "store", requests=[folder / "request.json"]))
        made.append((first, build_archive(ArchiveRequest(str(first), folder / "store"))))
        lines: list[str] = []
        plan = certified(write_plan(folder / "plan", first, certificate=CERTIFICATE), traffic(first))
        assert traffic(packed(user, folder / "planned", lines=lines, plan=plan)) == traffic(first)
        assert not [line for line in lines if "other traffic" in line], "the plan is for this traffic"
    (zero, zero_again), (five, five_again) = made
    assert read_archive(zero).description.sha256 == read_archive(five).description.sha256
    assert traffic(zero) == traffic(zero_again) != traffic(five) == traffic(five_again)


def recorded_traffic(layout: ArchiveLayout, records: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the traffic that a worker of an unpacked archive records."""
    worker = worker_of(layout, records, monkeypatch)
    worker.step([Call("id", {"body": json.dumps([0.0] * 6)})])
    worker.close()
    [shard] = list_shards(records)
    return read_header(shard).traffic


def test_a_worker_records_the_traffic_of_its_files_as_they_are(
        first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    layout = unpacked(first, tmp_path / "unpacked")
    assert recorded_traffic(layout, tmp_path / "records-0", monkeypatch) == traffic(first)
    assert not [line for line in caplog.messages if "changed since" in line]
    (layout.root / "classes.txt").write_text("somebody edited the unpacked archive")
    assert recorded_traffic(layout, tmp_path / "records-1", monkeypatch) not in ("", traffic(first))
    [line] = [line for line in caplog.messages if "changed since" in line]
    assert line.startswith("classes.txt changed since the archive was made"), "it is said which file it was"


def test_compiled_python_in_a_users_archive_is_no_traffic(first: Path, source: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    mar = packed(rewritten(source, tmp_path / "compiled.mar", **{"more/__pycache__/more.cpython-311.pyc": b"code"}),
                 tmp_path)
    recorded = recorded_traffic(unpacked(mar, tmp_path / "unpacked"), tmp_path / "records", monkeypatch)
    assert recorded == traffic(mar) == traffic(first)


def test_names_that_a_server_without_unicode_cannot_write_are_known_as_it_writes_them(
        source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mar = packed(rewritten(source, tmp_path / "named.mar", **{"größe.txt": b"3"}), tmp_path)
    layout = unpacked(mar, tmp_path / "unpacked")
    (layout.root / "größe.txt").rename(layout.root / "gr??e.txt")
    assert recorded_traffic(layout, tmp_path / "records", monkeypatch) == traffic(mar)


def test_a_set_in_the_configuration_is_the_same_in_each_process(source: Path, tmp_path: Path) -> None:
    mar = packed(rewritten(source, tmp_path / "set.mar", **{"own.yaml": b"names: !!set {alpha, beta, gamma, delta}"}),
                 tmp_path)
    code = ("import sys; from pathlib import Path; from early_exit.handler.archive_contents import read_archive; "
            "from early_exit.training.data.traffic import traffic_of; "
            "print(traffic_of(read_archive(Path(sys.argv[1]))))")
    found = {subprocess.run([sys.executable, "-c", code, mar], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2", "3")}
    assert found == {f"{traffic(mar)}\n"} != {"\n"}


def test_shards_of_other_traffic_are_skipped_with_their_number(first: Path, source: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    other = packed(rewritten(source, tmp_path / "other.mar", **CHANGES["file"]), tmp_path)
    for number, mar in enumerate((first, other)):
        worker = worker_of(unpacked(mar, tmp_path / f"unpacked-{number}"), tmp_path / "records", monkeypatch)
        worker.step([Call(f"id-{row}", {"body": json.dumps([float(row)] * 6)}) for row in range(5 + number)])
        worker.close()
    shards, lines = list_shards(tmp_path / "records"), list[str]()
    [kept] = of_traffic(shards, traffic(first), lines.append)
    assert read_header(kept).traffic == traffic(first)
    [line] = lines
    assert line.startswith("6 records are skipped: they are of other traffic")


def certified(plan: Path, of: str) -> Path:
    made, _ = load_plan(plan)
    text = json.loads(plan.read_text())
    text["traffic"] = of
    plan.write_text(json.dumps(text))
    assert load_plan(plan)[0] == replace(made, traffic=of)
    return plan


@pytest.mark.parametrize("is_other", [False, True])
def test_a_plan_that_is_certified_for_other_traffic_lets_nobody_leave(
        is_other: bool, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    plan = write_plan(tmp_path / "plan", first, threshold=0.0, certificate=CERTIFICATE)
    plan = certified(plan, "0" * 64 if is_other else traffic(first))
    lines: list[str] = []
    mar = packed(first, tmp_path, "3.0", lines, plan=plan)
    assert is_other == any("certificate is about other traffic" in line for line in lines)
    worker = worker_of(unpacked(mar, tmp_path / "unpacked"), tmp_path / "records", monkeypatch)
    [reply] = worker.step([Call("id", {"body": json.dumps([1.0] * 6)})])
    worker.close()
    assert reply is not None and (reply.headers["X-Early-Exit"] == "full") == is_other
    assert is_other == any("certificate is about other traffic" in line for line in caplog.messages)
    if is_other:
        assert worker.model.shadow.rate == ServingConfig().sampling(has_exits=False), "so a new plan is soon there"


@pytest.mark.parametrize("is_other", [False, True])
def test_a_certificate_about_other_traffic_is_shown_nowhere(is_other: bool, first: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", first, certificate=CERTIFICATE)
    mar = packed(first, tmp_path, "3.0", plan=certified(plan, "0" * 64 if is_other else traffic(first)))
    contents, promise = read_archive(mar), Promises(mar.parent).of(mar.name)
    served = replace(seen(100, plan=contents.plan), traffic=traffic_of(contents))
    assert promise is not None and contents.plan is not None and contents.plan.certificate == CERTIFICATE
    assert (promise["certificate"] is None, promise["watched"] is None) == (is_other, is_other)
    assert promise["is_of_other_traffic"] == is_other
    for shown in (in_words(mar), _certificate(served), json.dumps(promise)):
        assert (CERTIFICATE.in_words() in shown) != is_other
    for shown in (in_words(mar), _certificate(served)):
        assert ("the plan is certified for other traffic than this version gets" in shown) == is_other


def test_an_archive_of_before_has_no_traffic_and_its_plan_is_taken_as_it_is(first: Path, tmp_path: Path) -> None:
    def without_files(text: str) -> str:
        description = json.loads(text)
        del description["files"]
        return json.dumps(description)

    old = rewritten(first, tmp_path / "old.mar", **{"early_exit/handler.json": without_files})
    assert traffic(old) == ""
    plan, _ = load_plan(write_plan(tmp_path / "plan", first, certificate=CERTIFICATE))
    assert plan.is_certified_for("") and plan.is_certified_for("abc")
    assert "traffic" not in plan.to_json(), "its digest names files of the last release"


def test_only_the_users_files_count(first: Path) -> None:
    assert sorted(read_archive(first).handler.files or ()) == ["classes.txt", "rows_model.py", "weights.pth"]
