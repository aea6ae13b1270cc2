"""An archive's description of itself is read without unpacking the archive, and every error names the faulty entry."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import nn

from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import DESCRIPTION_FILE, MANIFEST, PLAN_FILE, PROGRAM_FILE
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import ArchiveError, FormatError
from early_exit.handler.sample_request import Part, SampleRequest
from tests.support.plans import random_exits

DESCRIPTION, PLAN, PROGRAM = (f"early_exit/{name}" for name in (DESCRIPTION_FILE, PLAN_FILE, PROGRAM_FILE))
ORIGINAL, SAMPLE, CONFIGURATION = "early_exit/original-manifest.json", "early_exit/sample-request", "model-config.yaml"
MODEL = {"modelName": "digits", "modelVersion": "2.0", "configFile": CONFIGURATION}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.from_module(nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 3)).eval(), (8,))


@pytest.fixture(scope="module")
def entries(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return all entries of an archive by name. The exported program is left out, since nothing reads it."""
    description = tmp_path_factory.mktemp("description") / DESCRIPTION_FILE
    backbone.description.save(description)
    plan, _ = random_exits(backbone)
    return {MANIFEST: json.dumps({"model": MODEL}).encode(), CONFIGURATION: b"batchSize: 4\n",
            ORIGINAL: json.dumps({"model": {"handler": "digits_handler.py"}}).encode(),
            DESCRIPTION: description.read_bytes(), PLAN: json.dumps(plan.to_json()).encode(), SAMPLE: b"\x89PNG"}


def written(path: Path, entries: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_everything_is_found_though_the_weights_are_damaged(entries: dict[str, bytes], backbone: Backbone,
                                                            tmp_path: Path) -> None:
    program = b"weights" * 1000
    mar = written(tmp_path / "digits.mar", {**entries, PROGRAM: program})
    mar.write_bytes(mar.read_bytes().replace(program, program[::-1]))
    with zipfile.ZipFile(mar) as archive:
        assert archive.testzip() == PROGRAM
    contents = read_archive(mar)
    assert (contents.model, contents.version) == ("digits", "2.0")
    assert contents.description == backbone.description
    assert contents.plan == random_exits(backbone)[0]
    assert contents.original_manifest["model"]["handler"] == "digits_handler.py"
    assert contents.configuration == "batchSize: 4\n"
    assert contents.samples == (SampleRequest((Part(b"\x89PNG"),)),) and not contents.is_compared


def test_what_an_archive_may_lack_is_none(entries: dict[str, bytes], tmp_path: Path) -> None:
    model = {key: value for key, value in MODEL.items() if key != "configFile"}
    least = {MANIFEST: json.dumps({"model": model}).encode(),
             **{name: entries[name] for name in (ORIGINAL, DESCRIPTION)}}
    contents = read_archive(written(tmp_path / "digits.mar", least))
    assert contents.plan is None and contents.samples == () and contents.configuration == ""


@pytest.mark.parametrize("missing", [MANIFEST, ORIGINAL, DESCRIPTION])
def test_an_archive_that_is_not_ours_is_refused_with_what_it_lacks(entries: dict[str, bytes], missing: str,
                                                                   tmp_path: Path) -> None:
    mar = written(tmp_path / "digits.mar", {name: content for name, content in entries.items() if name != missing})
    with pytest.raises(ArchiveError, match=f"is not an early-exit archive: it has no {missing}. Make one"):
        read_archive(mar)


@pytest.mark.parametrize(("name", "content", "message"), [
    (MANIFEST, b"[]", "expected a JSON object"),
    (MANIFEST, b'{"model": {"modelName": "digits"}}', "expected the name and the version of a model"),
    (DESCRIPTION, b"{", "is not JSON"),
    (DESCRIPTION, b'{"format": 2}', "not a complete description"),
    (CONFIGURATION, b"\xff", "cannot read"),
])
def test_a_damaged_entry_is_named(entries: dict[str, bytes], name: str, content: bytes, message: str,
                                  tmp_path: Path) -> None:
    mar = written(tmp_path / "digits.mar", {**entries, name: content})
    with pytest.raises(ArchiveError, match=message) as raised:
        read_archive(mar)
    assert str(mar) in str(raised.value)


@pytest.mark.parametrize("name", [DESCRIPTION, PLAN])
def test_an_entry_of_a_newer_format_is_refused(entries: dict[str, bytes], name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"digits.mar: {name} is .* of format 99, this version reads"):
        read_archive(written(tmp_path / "digits.mar", {**entries, name: b'{"format": 99}'}))


@pytest.mark.parametrize("keep", [0, 100, 500])
def test_a_file_that_is_cut_short_is_refused(entries: dict[str, bytes], keep: int, tmp_path: Path) -> None:
    mar = written(tmp_path / "digits.mar", entries)
    mar.write_bytes(mar.read_bytes()[:keep])
    with pytest.raises(ArchiveError, match="cannot read"):
        read_archive(mar)
