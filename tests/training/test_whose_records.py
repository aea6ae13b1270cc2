"""Whose records train and certify a model: several models may have one backbone and one handler, but other requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import list_shards, read_header
from early_exit.training.cli import main as ee_train
from early_exit.training.data.shards import find_shards
from tests.archiver.test_watched_records import looked, shard_of, store
from tests.support.recording import record
from tests.support.residual import recorded_inputs, residual_backbone

__all__ = ["store"]  # the fixture
SKIPPED = "records of faces are skipped: they are requests to another model, although its backbone is that of digits"


def records_of(folder: Path, *names: str) -> Path:
    """Record requests to models that have the same backbone."""
    for number, name in enumerate(names):
        record(residual_backbone(), recorded_inputs()[:20], folder, name=name, first_request=100 * number)
    return folder


def found(folder: Path, lines: list[str], *, may_be_renamed: bool = False) -> set[str]:
    shards = find_shards(folder, "digits", residual_backbone().description, lines.append, may_be_renamed=may_be_renamed)
    return {read_header(shard).model for shard in shards}


@pytest.mark.parametrize("may_be_renamed", [False, True])
@pytest.mark.parametrize("is_moved", [False, True])
def test_records_of_another_model_with_the_same_backbone_are_skipped_with_a_line(
        is_moved: bool, may_be_renamed: bool, tmp_path: Path) -> None:
    lines, folder = list[str](), records_of(tmp_path / "records", "faces", "digits")
    if is_moved:  # the folder of a shard does not tell whose it is
        (folder / "faces").rename(folder / "digits" / "faces")
    assert found(folder, lines, may_be_renamed=may_be_renamed) == {"digits"} and lines == [SKIPPED]


def test_records_of_a_model_that_is_served_under_another_name_are_used_with_a_line(tmp_path: Path) -> None:
    lines, folder = list[str](), records_of(tmp_path / "records", "photos")
    assert found(folder, lines, may_be_renamed=True) == {"photos"}
    assert lines == ["there are no records of digits, so those of photos are used: if digits is not served under that "
                     "name, a plan from them is certified for requests to another model"]
    with pytest.raises(RecordError, match="has no records of digits .* it has photos"):
        found(folder, lines)


def test_among_several_other_names_the_user_chooses_with_the_folder(tmp_path: Path) -> None:
    folder = records_of(tmp_path / "records", "faces", "photos")
    with pytest.raises(RecordError, match="served under another name, pass only the records folder of that name"):
        found(folder, [], may_be_renamed=True)
    assert found(folder / "photos", [], may_be_renamed=True) == {"photos"}


def test_a_shard_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path) -> None:
    folder = records_of(tmp_path / "records", "digits")
    [shard] = list_shards(folder)
    shard.write_bytes(b"")
    assert find_shards(folder, "digits", residual_backbone().description) == [shard]


@pytest.mark.parametrize(("names", "line"), [
    (["photos"], "ee-train: there are no records of digits, so those of photos are used"),
    (["digits", "faces"], f"ee-train: {SKIPPED}"),
    (["faces", "photos"], "pass only the records folder of that name")])
def test_ee_train_says_whose_records_it_uses(
        names: list[str], line: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records_of(tmp_path / "records", *names)
    mar = store / "digits-2.0.mar"
    assert ee_train([str(folder), "--archive", str(mar), "--to", str(tmp_path / "run")]) == 1, "20 are too few"
    assert line in capsys.readouterr().err


def test_ee_watch_uses_records_of_the_served_name_only(store: Path, tmp_path: Path) -> None:
    lines, folder = list[str](), records_of(tmp_path / "records", "faces")
    assert not looked(store, folder, lines).shards and lines == [SKIPPED]
    own = shard_of(folder, "")
    assert looked(store, folder, lines).shards == (own,)
