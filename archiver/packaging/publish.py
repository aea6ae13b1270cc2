"""Archives as files: the same contents give the same bytes, and no archive replaces another one."""

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
        folder: the folder whose files are zipped.
        target: the archive.
        without: a file of the folder that is also left out.
    """
    files = sorted(path for path in folder.rglob("*")
                   if path.is_file() and COMPILED not in path.parts and path != without)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # deflate differs between zlib versions
        for path in files:
            entry = zipfile.ZipInfo(str(path.relative_to(folder)), _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size  # zipfile must know in advance of entries above 2 GiB
            with path.open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def publish(draft: Path, target: Path) -> None:
    """Put an archive into a model store, under a name that is free or that the same archive has; the draft stays.

    The archive appears when it is complete. In a store without hard links, it appears when its copy begins.

    Raises:
        ArchiveError: another archive has the name. A server may serve it, and would load this one after a restart.
        OSError: the archive cannot be written.
    """
    try:
        _appear(draft, target)
    except FileExistsError:
        if not _is_same(draft, target):
            raise ArchiveError(f"{target} exists already with other contents, and a server may serve it: pass another "
                               "--version, or remove it") from None


def _appear(draft: Path, target: Path) -> None:
    """Link or copy a draft to a target.

    Raises:
        FileExistsError: the target exists. The file system decides this, so one of two publishers is refused.
    """
    try:
        os.link(draft, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # The store has no hard links, as on FAT or SMB. The name is taken first: an incomplete archive is visible
        # during the copy, but no other archive is overwritten.
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
    except OSError:  # a dangling link
        return False
