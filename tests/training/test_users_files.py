"""Files that users provide: other encodings, labels of other requests, truncated shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from early_exit.archiver.packaging.configuration import read_configuration
from early_exit.archiver.packaging.manifest import manifest_text
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import ArchiveError, ConfigError, RecordError
from early_exit.handler.recording.format import list_shards, request_hash
from early_exit.training.data.labels import load_labels
from early_exit.training.data.preprocessing import archived_config
from early_exit.training.data.shards import readable_shards
from early_exit.training.heads.nni_service import Service
from early_exit.training.heads.space import SearchSpace
from early_exit.training.text_files import read_yaml
from tests.training.test_sources import write_records

IDS = [f"request-{number}" for number in range(8)]
REQUESTS = torch.tensor([request_hash(name) for name in IDS])
ROWS = torch.zeros(len(IDS), dtype=torch.int64)


def labels(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding)
    return path


def test_labels_of_an_editor_that_marks_the_byte_order_are_those_of_others(tmp_path: Path) -> None:
    lines = "\n".join(f"{name},{number % 3}" for number, name in enumerate(IDS))
    plain, marked = (load_labels(labels(tmp_path / f"{encoding}.csv", lines, encoding), REQUESTS, ROWS, 3)
                     for encoding in ("utf-8", "utf-8-sig"))
    assert torch.equal(plain, marked) and bool((marked >= 0).all()), "the first label counts as the others do"


@pytest.mark.parametrize(("text", "encoding", "message"), [
    ("request-0,1\n", "utf-16", "expected UTF-8, found the byte 0xff"),
    ("request-é,1\n", "latin-1", "expected UTF-8, found the byte 0xe9"),
    ("request-0,1\nrequest-1,0\nrequest-0,2\n", "utf-8", "line 3: .*'request-0' has the class 2, but 1 in line 1"),
    ("request-0,²\n", "utf-8", "line 1: expected 'request id,class'"),
    ("request-0\n", "utf-8", "line 1: expected 'request id,class'"),
    ("stranger,1\n", "utf-8", "none belongs to a record"),
])
def test_labels_that_cannot_be_meant_so_are_refused_with_their_line(
        text: str, encoding: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=message):
        load_labels(labels(tmp_path / "labels.csv", text, encoding), REQUESTS, ROWS, 3)


def test_a_label_for_one_of_several_instances_says_for_which(tmp_path: Path) -> None:
    """Without that it would count for the first instance, and the certificate would compare with a wrong class."""
    requests, instances = REQUESTS[[0, 0, 1]], torch.tensor([0, 1, 0])
    with pytest.raises(RecordError, match="line 2: the request 'request-0' has several instances"):
        load_labels(labels(tmp_path / "labels.csv", "request-1,2\nrequest-0,1\n"), requests, instances, 3)
    told = labels(tmp_path / "labels.csv", "request-1,2\nrequest-0,0,1\nrequest-0,1,0\n")
    assert load_labels(told, requests, instances, 3).tolist() == [1, 0, 2]


def test_the_same_label_twice_contradicts_nothing(tmp_path: Path) -> None:
    found = load_labels(labels(tmp_path / "labels.csv", "id,label\nrequest-0,1\nrequest-0,1\n"), REQUESTS, ROWS, 3)
    assert found.tolist() == [1] + [-1] * 7


def test_it_is_told_when_most_labels_belong_to_no_record(tmp_path: Path) -> None:
    told: list[str] = []
    strangers = "".join(f"stranger-{number},0\n" for number in range(9))
    load_labels(labels(tmp_path / "labels.csv", "request-0,1\n" + strangers), REQUESTS, ROWS, 3, told.append)
    assert len(told) == 1 and told[0].startswith("1 of the 10 requests in")
    load_labels(labels(tmp_path / "labels.csv", "request-0,1\n"), REQUESTS, ROWS, 3, told.append)
    assert len(told) == 1


@pytest.mark.parametrize("content", [
    "minWorkers: 1 # für alle".encode("latin-1"), "minWorkers: 1".encode("utf-16"), b"a: [", b"a: 2023-13-45",
    b"[" * 5000], ids=["latin-1", "utf-16", "no YAML", "no date", "deep"])
def test_every_reader_of_yaml_names_the_file_that_it_cannot_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model-config.yaml"
    path.write_bytes(content)
    manifest = tmp_path / "MAR-INF" / "MANIFEST.json"
    manifest.parent.mkdir()
    manifest.write_text('{"model": {"modelName": "m", "handler": "h", "configFile": "model-config.yaml"}}')
    for read in (SearchSpace.load, Service.load, lambda path: read_yaml(path, "the file"),
                 lambda path: read_configuration(path, None, print),
                 lambda path: archived_config(ArchiveLayout(path.parent))):
        with pytest.raises(ConfigError, match=f"cannot read the .*{path.name}"):
            read(path)


def test_a_configuration_of_an_editor_that_marks_the_byte_order_is_read(tmp_path: Path) -> None:
    (tmp_path / "model-config.yaml").write_text("batchSize: 4\n", "utf-8-sig")
    assert read_yaml(tmp_path / "model-config.yaml", "the configuration") == {"batchSize": 4}


@pytest.mark.parametrize("version", ["inf", "nan", "1e999", "main"])
def test_a_version_that_cannot_be_counted_up_asks_for_another(version: str) -> None:
    original = {"model": {"modelName": "m", "handler": "h", "modelVersion": "1.0"}}
    with pytest.raises(ArchiveError, match=f"version '{version}', which is not a number to count up from: pass"):
        manifest_text(original, name="model", version=None, config_file=None, replaces=version)


def test_a_shard_that_was_cut_short_is_skipped_and_told(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_records(tmp_path, name, 4)
    first, second = list_shards(tmp_path)
    second.write_bytes(second.read_bytes()[:-40])
    told: list[str] = []
    assert readable_shards([first, second], told.append) == [first]
    assert len(told) == 1 and str(second) in told[0] and told[0].endswith("It is skipped")
    with pytest.raises(RecordError, match="none of the 1 record shards can be read"):
        readable_shards([second], told.append)


def gone(path: Path) -> None:
    path.unlink()


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def without_a_row(path: Path) -> None:
    """Write a file that can be opened, but in which one column is shorter than the others."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    save_file({**tensors, "time": tensors["time"][1:].clone()}, path, metadata)


@pytest.mark.parametrize("damage", [
    gone, link_to_itself, without_a_row, lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"no shard at all" * 100),
    lambda path: path.write_bytes(path.read_bytes()[:9]), lambda path: save_file({"time": torch.zeros(3)}, path),
    lambda path: save_file({"time": torch.zeros(3)}, path, {"format": "3"}),
    lambda path: save_file({"time": torch.zeros(3)}, path, {"format": "3", "header": "{}"}),
    lambda path: save_file({"time": torch.zeros(3)}, path, {"format": "999"})],
    ids=["gone", "a link to itself", "a short column", "empty", "foreign", "cut short", "foreign safetensors",
         "no header", "another header", "newer"])
def test_a_file_that_is_no_shard_is_skipped_and_told(damage: Callable[[Path], object], tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_records(tmp_path, name, 4)
    first, second = list_shards(tmp_path)
    damage(second)
    told: list[str] = []
    assert set(list_shards(tmp_path)) == {first, second} - ({second} if damage is gone else set())
    assert readable_shards([first, second], told.append) == [first]
    assert len(told) == 1 and str(second) in told[0] and told[0].endswith("It is skipped")
