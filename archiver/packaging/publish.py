"""Archives as files: the same contents give the same bytes, and none takes the place of another."""

from __future__ import annotations

import filecmp
import os
import shutil
import zipfile
from pathlib import Path

from early_exit.handler.errors import ArchiveError

_EPOCH = (1980, 1, 1, 0, 0, 0)


def zip_folder(folder: Path, target: Path, without: Path | None = None) -> None:
    """Zip a folder so that the same files give the same bytes; compiled Python is left out.

    Args:
        folder: whose files are zipped.
        target: the archive.
        without: a file of the folder that is left out too.
    """
    files = sorted(path for path in folder.rglob("*")
                   if path.is_file() and "__pycache__" not in path.parts and path != without)
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
    """Let an archive appear in a model store.

    Raises:
        ArchiveError: another one has its name: a server may serve that, and would get this one when it restarts.
    """
    if target.exists() and not filecmp.cmp(draft, target, shallow=False):
        raise ArchiveError(f"{target} is there already and holds something else, which may be served: pass another "
                           "--version, or remove it")
    draft.replace(target)
