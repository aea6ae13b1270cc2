"""Models are read in each format that torch-model-archiver writes, and archives with dangerous entries are refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources import unpacking
from early_exit.archiver.packaging.sources.source import unpack_source
from early_exit.archiver.packaging.sources.unpacking import is_packaged_model, unpack
from early_exit.handler.archive_layout import MANIFEST, ArchiveLayout
from early_exit.handler.errors import ArchiveError
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import original_mar

WORKERS = "minWorkers: 1\nmaxWorkers: 1\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "MANIFEST.json"}


@pytest.mark.parametrize(("archive_format", "name"), [("tgz", "digits.tar.gz"), ("no-archive", "digits")])
def test_each_format_of_the_archiver_holds_the_same_files(archive_format: str, name: str, tmp_path: Path) -> None:
    weights = DigitsResNet().state_dict()
    unpacked = []
    for number, (kind, file) in enumerate((("default", "digits.mar"), (archive_format, name))):
        folder, target = tmp_path / str(number), tmp_path / f"unpacked-{number}"
        original_mar(folder, "digits", "digits_resnet.py", "digits_handler.py", weights, WORKERS, archive_format=kind)
        assert is_packaged_model(str(folder / file))
        target.mkdir()
        unpack(folder / file, target)
        assert (target / MANIFEST).is_file()
        unpacked.append(contents(target))
    assert unpacked[0] == unpacked[1]
    assert set(unpacked[0]) == {"digits_resnet.py", "digits_handler.py", "weights.pth", "model-config.yaml"}


def tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                archive.addfile(entry, io.BytesIO(member[1]))
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


MANIFEST_ENTRY = (f"digits/{MANIFEST}", b"{}")
ATTACKS = {
    "a name that leads out": (("../outside.py", b"x"), "leaves the archive"),
    "an absolute name": (("/tmp/outside.py", b"x"), "leaves the archive"),
    "a symbolic link": (link("digits/passwords", "/etc/passwd", tarfile.SYMTYPE), "is a link or a device"),
    "a hard link": (link("digits/hard", "digits/other", tarfile.LNKTYPE), "is a link or a device"),
    "a device": (link("digits/device", "", tarfile.CHRTYPE), "is a link or a device"),
    "the same entry twice": (MANIFEST_ENTRY, "twice"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_tar_that_would_write_or_read_elsewhere_is_refused(attack: str, tmp_path: Path) -> None:
    entry, message = ATTACKS[attack]
    target = tmp_path / "in" / "model"
    target.mkdir(parents=True)
    with pytest.raises(ArchiveError, match=message):
        unpack(tar(tmp_path / "evil.tar.gz", MANIFEST_ENTRY, entry), target)
    assert not list(target.iterdir()), "nothing is unpacked of an archive that is refused"


def test_a_tar_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "_SMALL_BYTES", 2**16)
    bomb = tar(tmp_path / "bomb.tgz", MANIFEST_ENTRY, ("digits/zeros", bytes(2**22)))
    with pytest.raises(ArchiveError, match="would unpack to more than [0-9]+ bytes"):
        unpack(bomb, tmp_path)


@pytest.mark.parametrize(("content", "message"), [
    (b"no tar at all", "cannot read"), (b"", "cannot read")])
def test_a_file_that_is_no_tar_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.tar.gz").write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        unpack(tmp_path / "broken.tar.gz", tmp_path)


def test_a_tar_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar.gz", MANIFEST_ENTRY, ("digits/noise", bytes(range(256)) * 999)).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ArchiveError, match="cannot read"):
        unpack(tmp_path / "cut.tar.gz", tmp_path)


def test_a_tar_or_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for source in (tar(tmp_path / "other.tar.gz", ("digits/model.py", b"")), folder):
        with pytest.raises(ArchiveError, match="has no MAR-INF/MANIFEST.json: expected .* torch-model-archiver"):
            unpack(source, tmp_path)


@pytest.mark.parametrize("name", ["early_exit.py", "early_exit/losses.py"])
def test_a_file_with_the_name_of_the_code_for_early_exits_is_refused(name: str, tmp_path: Path) -> None:
    """Our code would hide it from the handler that imports it, or it would hide ours."""
    model, layout = tmp_path / "model", ArchiveLayout(tmp_path / "archive")
    (model / "MAR-INF").mkdir(parents=True)
    (model / MANIFEST).write_text('{"model": {"modelName": "digits", "handler": "digits_handler.py"}}')
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).touch()
    layout.root.mkdir()
    with pytest.raises(ArchiveError, match=f"contain {name.partition('/')[0]}, .*: rename it"):
        unpack_source(ArchiveRequest(str(model), tmp_path), layout)
