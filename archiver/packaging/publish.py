"""Archives as files: the same contents give the same bytes, and none takes the place of another."""

from __future__ import annotations

import filecmp
import os
import shutil
import zipfile
from pathlib import Path

from early_exit.handler.archive_layout import COMPILED
from early_exit.handler.errors import ArchiveError
from early_exit.handler.files.private import NO_LINKS

_EPOCH = (1980, 1, 1, 0, 0, 0)


def zip_folder(folder: Path, target: Path, without: Path | None = None) -> None:
    """Zip a folder so that the same files give the same bytes; compiled Python is left out.

    Args:
        folder: whose files are zipped.
        target: the archive.
        without: a file of the folder that is left out too.
    """
    files = sorted(path for path in folder.rglob("*")
                   if path.is_file() and COMPILED not in path.parts and path != without)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # deflate differs between zlib versions
        for path in files:
            entry = zipfile.ZipInfo(str(path.relative_to(folder)), _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size  # beyond 2 GiB the entry must be made for it
            with path.open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def publish(draft: Path, target: Path) -> None:
    """Let an archive appear in a model store, complete, where nothing has its name; the draft is left.

    Raises:
        ArchiveError: another one has its name: a server may serve that, and would get this one when it restarts.
        OSError: it cannot be written.
    """
    try:
        _appear(draft, target)
    except FileExistsError:
        if not _is_same(draft, target):
            raise ArchiveError(f"{target} is there already and holds something else, which may be served: pass another "
                               "--version, or remove it") from None


def _appear(draft: Path, target: Path) -> None:
    """Raise FileExistsError where there is a target; the file system decides, so of two publishers one is refused."""
    try:
        os.link(draft, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # A store without hard links, such as one on FAT or SMB: the name is taken first, so an archive that is being
        # copied can be seen, but no other one is overwritten.
        with target.open("xb") as sink:
            try:
                with draft.open("rb") as source:
                    shutil.copyfileobj(source, sink)
                os.fsync(sink.fileno())
            except BaseException:
                target.unlink()
                raise


def _is_same(draft: Path, target: Path) -> bool:
    try:
        return filecmp.cmp(draft, target, shallow=False)
    except OSError:  # a link to nothing
        return False
