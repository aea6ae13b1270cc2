"""Unpacks models in all forms that TorchServe loads: a .mar, a .tar.gz, or a folder that was never archived."""

from __future__ import annotations

import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from early_exit.handler.archive_layout import COMPILED, MANIFEST, extract
from early_exit.handler.errors import ArchiveError

_TARS = (".tar.gz", ".tgz")
_SMALL_BYTES = 2 * 2**30
"""The size to which any archive may unpack."""
_MOST_EXPANSION = 20
"""The size to which a larger archive may unpack, as a multiple of its own size: weights are hardly compressible."""


def is_packaged_model(source: str) -> bool:
    """Tell whether a source is something that torch-model-archiver made."""
    return source.endswith((".mar", *_TARS)) or Path(source).is_dir()


def unpack(source: Path, folder: Path) -> None:
    """Lay out the files of a model that torch-model-archiver packaged, in any of its formats, in an existing folder.

    Raises:
        ArchiveError: the model is damaged or has no manifest, or one of its entries is a link or would land outside the
            folder.
    """
    if source.is_dir():
        _copy(source, folder)
    elif source.name.endswith(_TARS):
        _extract_tar(source, folder)
    else:
        extract(source, folder)


def _copy(source: Path, folder: Path) -> None:
    if not (source / MANIFEST).is_file():
        raise ArchiveError(f"{source} has no {MANIFEST}: expected a folder made by torch-model-archiver "
                           "--archive-format no-archive")
    try:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(COMPILED))
    except OSError as error:
        raise ArchiveError(f"cannot copy the model in {source}: {error}") from error


def _extract_tar(source: Path, folder: Path) -> None:
    """Unpack the files that TorchServe finds in a .tar.gz, at its top or in one folder."""
    try:
        with tarfile.open(source, "r:gz") as archive:
            members = _harmless_members(archive, source)
            names = {PurePosixPath(member.name) for member in members}
            top = next((name.parents[1] for name in names if name.match(MANIFEST) and len(name.parts) <= 3), None)
            if top is None:
                raise ArchiveError(f"{source} has no {MANIFEST}: expected an archive made by torch-model-archiver "
                                   "--archive-format tgz")
            for member in members:
                path = PurePosixPath(member.name)
                content = archive.extractfile(member)
                if content is None or not path.is_relative_to(top):
                    continue
                target = folder / path.relative_to(top)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as sink:
                    shutil.copyfileobj(content, sink)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ArchiveError(f"cannot read {source} as a model archive: {error}") from error


def _harmless_members(archive: tarfile.TarFile, source: Path) -> list[tarfile.TarInfo]:
    """Return the entries of an archive, after checking that all are files and folders inside it, of a sane size."""
    allowed = max(_SMALL_BYTES, _MOST_EXPANSION * source.stat().st_size)
    members: dict[PurePosixPath, tarfile.TarInfo] = {}
    unpacked = 0
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name.partition("/")[0]:
            raise ArchiveError(f"{source} holds the entry {member.name!r}, which leaves the archive: refused")
        if not member.isfile() and not member.isdir():
            raise ArchiveError(f"{source} holds the entry {member.name!r}, which is a link or a device: refused, "
                               "because only files and folders are expected")
        if path in members and not member.isdir():  # TorchServe may take the other one of the two
            raise ArchiveError(f"{source} holds the entry {member.name!r} twice: refused, archive the model again")
        members[path] = member
        unpacked += member.size
        if unpacked > allowed:  # checked before the rest of the archive is read
            raise ArchiveError(f"{source} would unpack to more than {allowed} bytes: refused. If that is your model, "
                               "archive it as a .mar")
    return list(members.values())
