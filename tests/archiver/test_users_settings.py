"""What a user gives is taken as it is, or refused: no file, option or version is silently replaced or ignored."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import MANIFEST
from early_exit.handler.backbone.image_class import Strategy
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.errors import ArchiveError
from tests.support.rewritten import rewritten
from tests.support.untried import build_untried

SHAPE = (1, 32, 32)


def without_configuration(text: str) -> str:
    manifest = json.loads(text)
    del manifest["model"]["configFile"]
    return json.dumps(manifest)


def test_a_configuration_that_only_the_handler_reads_stays_as_it_is(digits_mar: Path, tmp_path: Path) -> None:
    own = b"least: 0.9\nnames: [cat, dog, owl]\n"
    user = rewritten(digits_mar, tmp_path / "user.mar",
                     **{MANIFEST: without_configuration, "model-config.yaml": own})
    first = build_untried(ArchiveRequest(str(user), tmp_path, input_shape=SHAPE, engine="eager"))
    again = build_untried(ArchiveRequest(str(first), tmp_path, engine="folded"))
    for mar, engine in ((first, "eager"), (again, "folded")):
        with zipfile.ZipFile(mar) as archive:
            assert archive.read("model-config.yaml") == own
            named = json.loads(archive.read(MANIFEST))["model"]["configFile"]
            assert yaml.safe_load(archive.read(named)) == {"early_exit": {"engine": engine}}
        assert "model-config.yaml" in (read_archive(mar).handler.files or ()), "the handler's own file is traffic"


def test_the_handler_sees_the_version_of_the_users_archive_in_each_archive(recorder_mar: Path, tmp_path: Path) -> None:
    third = build_untried(ArchiveRequest(str(recorder_mar), tmp_path))
    fourth = build_untried(ArchiveRequest(str(third), tmp_path))
    assert (third.name, fourth.name) == ("digits-3.0.mar", "digits-4.0.mar")
    seen = {read_archive(mar).original_manifest["model"]["modelVersion"] for mar in (recorder_mar, third, fourth)}
    assert seen == {"1.0"}, "answers that hold it would otherwise differ from those of the archive before"


@pytest.mark.parametrize(("option", "more"), [
    ("--weights", {"weights": Path("finetuned.pth")}), ("--handler", {"handler": "new.py"}),
    ("--extra-files", {"extra_files": [Path("index_to_name.json")]})])
def test_an_option_for_a_factory_is_refused_for_an_archive(
        option: str, more: dict[str, Any], digits_mar: Path, recorder_mar: Path, tmp_path: Path) -> None:
    for mar in (digits_mar, recorder_mar):
        with pytest.raises(ArchiveError, match=f"{option} would have no effect on {mar.name}, which"):
            build_untried(ArchiveRequest(str(mar), tmp_path, **more))


@pytest.mark.parametrize(("option", "more"), [
    ("--input-shape", {"input_shape": (9,)}), ("--input", {"inputs": [InputSpec("x", (9,))]}),
    ("--output", {"output": "scores"}), ("--strategy", {"strategy": Strategy.OBJECT}),
    ("--service-envelope", {"service_envelope": "kserve"})])
def test_an_option_for_a_model_that_is_not_exported_yet_is_refused_for_our_archive(
        option: str, more: dict[str, Any], recorder_mar: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=f"{option} would have no effect on {recorder_mar.name}, which ee-archive"):
        build_untried(ArchiveRequest(str(recorder_mar), tmp_path, **more))


def test_records_are_refused_for_an_engine_that_is_not_made_from_them(recorder_mar: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="--calibrate would have no effect on the engine folded"):
        build_untried(ArchiveRequest(str(recorder_mar), tmp_path, calibrate=tmp_path))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "labels.txt").write_text(folder)
    asked = ArchiveRequest("torchvision.models:resnet18", tmp_path, weights=tmp_path / "w.pth", model_name="m",
                           handler="image_classifier",
                           extra_files=[tmp_path / "a" / "labels.txt", tmp_path / "b" / "labels.txt"])
    with pytest.raises(ArchiveError, match=r"found labels\.txt more than once"):
        build_untried(asked)
