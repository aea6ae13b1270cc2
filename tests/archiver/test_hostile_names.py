"""Names in archives, shards and servers' answers never lead out of the archive, the store, the records or the state."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from early_exit.archiver.audit import audit_of
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.tryout.trials import check
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.api import Api
from early_exit.archiver.watch.cli import main as watch
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import MANIFEST, extract, read_manifest
from early_exit.handler.backbone.image_class import DetectorSpec, Strategy
from early_exit.handler.errors import ArchiveError, RecordError, ServerError
from early_exit.handler.recording.format import ShardHeader
from early_exit.training.paths import RunPaths
from tests.support.rewritten import rewritten
from tests.support.untried import build_untried

LEAD_ELSEWHERE = ("../../x", "/etc/passwd", "..", ".hidden", "a/b", "a\\b", "a\0b", "a\nb")
BARE = "expected a bare name"
SHAPE = (1, 32, 32)


def with_value(key: str, value: str) -> Callable[[str], str]:
    """Return a function that changes one value of the model in a manifest."""
    def change(text: str) -> str:
        manifest = json.loads(text)
        manifest["model"][key] = value
        return json.dumps(manifest)

    return change


@pytest.mark.parametrize("key", ["modelName", "modelVersion", "serializedFile", "modelFile", "configFile",
                                 "requirementsFile"])
@pytest.mark.parametrize("value", LEAD_ELSEWHERE)
def test_no_name_in_a_manifest_leads_elsewhere(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "MANIFEST.json"
    path.write_text(with_value(key, value)('{"model": {"modelName": "digits", "handler": "image_classifier"}}'))
    with pytest.raises(ArchiveError, match=f"{key} in .* is .*{BARE}"):
        read_manifest(path)


@pytest.mark.parametrize("handler", ["../../x.py", "/tmp/x.py:handle", "a/../x.py", "..", "a\0.py", ".x:handle", 7])
def test_no_handler_leads_elsewhere(handler: object, tmp_path: Path) -> None:
    path = tmp_path / "MANIFEST.json"
    path.write_text(json.dumps({"model": {"modelName": "digits", "handler": handler}}))
    with pytest.raises(ArchiveError, match=f"handler .*{BARE}"):
        read_manifest(path)


@pytest.mark.parametrize("handler", [
    "image_classifier", "early_exit.handler.service", "handler.py", "handler.py:handle", "package/handler.py"])
def test_handlers_that_torchserve_serves_are_accepted(handler: str, tmp_path: Path) -> None:
    path = tmp_path / "MANIFEST.json"
    path.write_text(json.dumps({"model": {"modelName": "digits", "modelVersion": "1.0", "handler": handler}}))
    assert read_manifest(path)["model"]["handler"] == handler


@pytest.mark.parametrize(("key", "value"), [("serializedFile", "../../secret.pth"), ("modelFile", "../../code.py"),
                                            ("configFile", "../../config.yaml"), ("modelName", "../../digits")])
def test_an_archive_is_not_made_of_files_beside_its_source(
        key: str, value: str, digits_mar: Path, tmp_path: Path) -> None:
    evil = rewritten(digits_mar, tmp_path / "evil.mar", **{MANIFEST: with_value(key, value)})
    with pytest.raises(ArchiveError, match=f"{key} in .*{BARE}"):
        build_untried(ArchiveRequest(str(evil), tmp_path / "store", input_shape=SHAPE))
    assert not list((tmp_path / "store").glob("*"))


@pytest.mark.parametrize("asked", [{"model_name": "../../digits"}, {"version": "../7.0"}])
def test_an_archive_cannot_be_asked_for_outside_the_store(asked: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=BARE):
        ArchiveRequest("source.mar", tmp_path / "store", **asked)  # type: ignore[arg-type]


def test_neither_reading_nor_trying_out_an_archive_follows_its_names(recorder_mar: Path, tmp_path: Path) -> None:
    evil = rewritten(recorder_mar, tmp_path / "evil.mar", **{MANIFEST: with_value("configFile", "../../x.yaml")})
    for read in (read_archive, check):
        with pytest.raises(ArchiveError, match=f"configFile in .*{BARE}"):
            read(evil)


def test_the_model_file_of_a_detector_is_in_its_archive() -> None:
    with pytest.raises(ArchiveError, match=BARE):
        DetectorSpec("../../code.py", Strategy.OBJECT, 1, "ab")


@pytest.mark.parametrize(("model", "version", "backbone"), [
    ("../x", "1.0", "ab"), ("m", "../../1.0", "ab"), ("m", "1.0", "../../ab"), ("..", "1.0", "ab"), ("", "1.0", "ab")])
def test_records_are_not_written_outside_their_folder(model: str, version: str, backbone: str) -> None:
    with pytest.raises(RecordError, match=BARE):
        ShardHeader(model, version, backbone, 4, ())


@pytest.mark.parametrize("layer", ["..", "../..", "/etc/x", "."])
def test_a_layers_files_are_in_the_folder_of_the_run(layer: str, tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    for path in (run.trial(layer, 1), run.head(layer), run.trials(layer)):
        assert path.resolve().is_relative_to(tmp_path / path.relative_to(tmp_path).parts[0])


def test_an_archives_name_that_a_server_tells_is_in_the_store() -> None:
    talk = Api(Addresses.free()).versions("digits")
    next(talk)
    version = {"modelVersion": "1.0", "modelUrl": "http://elsewhere/.."}
    talk.send(httpx.Response(200, json=[version]))
    with pytest.raises(ServerError, match=BARE):
        talk.send(httpx.Response(200, json=[{**version, "minWorkers": 1, "maxWorkers": 1, "workers": [],
                                             "batchSize": 1, "maxBatchDelay": 1, "responseTimeout": 120,
                                             "jobQueueStatus": {"pendingRequests": 0}}]))


def test_a_model_whose_name_leads_elsewhere_has_no_decisions(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=BARE):
        audit_of(tmp_path, "../../x")


def test_a_model_whose_name_leads_elsewhere_is_not_watched(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here" / "model-store").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert watch(["../../x", "--once", "--no-tokens"]) == 1
    assert BARE in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "model-store"]


def test_an_entry_that_is_a_link_is_refused(digits_mar: Path, tmp_path: Path) -> None:
    evil = rewritten(digits_mar, tmp_path / "evil.mar")
    with zipfile.ZipFile(evil, "a") as archive:
        link = zipfile.ZipInfo("weights.link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert_refused(evil, tmp_path, "'weights.link', which is a link or a device")


def test_an_entry_that_is_there_twice_is_refused(recorder_mar: Path, tmp_path: Path) -> None:
    """TorchServe might read one of the two entries, and the code that checks the archive the other."""
    evil = rewritten(recorder_mar, tmp_path / "evil.mar")
    with zipfile.ZipFile(evil, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MANIFEST, archive.read(MANIFEST))
    assert_refused(evil, tmp_path, "MANIFEST.json' twice")
    with pytest.raises(ArchiveError, match="twice"):
        read_archive(evil)


def test_an_archive_that_would_fill_the_disk_is_refused_before_it_is_unpacked(
        recorder_mar: Path, tmp_path: Path) -> None:
    evil = rewritten(recorder_mar, tmp_path / "evil.mar")
    with zipfile.ZipFile(evil, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(2**20))
        archive.getinfo("zeros").file_size = 2**40  # the size that the zip's directory claims
    assert_refused(evil, tmp_path, "would unpack to 1099")
    with pytest.raises(ArchiveError, match="would unpack to 1099"):
        read_archive(evil)


def assert_refused(mar: Path, folder: Path, message: str) -> None:
    (folder / "unpacked").mkdir()
    with pytest.raises(ArchiveError, match=message):
        extract(mar, folder / "unpacked")
    assert list((folder / "unpacked").iterdir()) == []
