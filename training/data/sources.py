"""Where records come from: any number of folders, shared volumes and URLs that fsspec knows, such as s3://."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from early_exit.handler.errors import RecordError
from early_exit.handler.files.private import private_folder, replacing
from early_exit.handler.monitor.shared_state import MONITOR_FILES
from early_exit.handler.recording.format import SUFFIX
from early_exit.training.credentials import without_credentials


def local_folders(sources: Sequence[str], cache: Path) -> list[Path]:
    """Return the local folder of each source, each once; records at a URL are copied into the cache, or updated there.

    Raises:
        RecordError: a URL cannot be read.
    """
    return [_copied(source, cache) if "://" in source else Path(source) for source in each_once(sources)]


def each_once(sources: Sequence[str]) -> list[str]:
    """Return the sources without those that name the folder or URL of an earlier one."""
    once: dict[str, str] = {}
    for source in sources:
        # A folder and a link to it are one source.
        once.setdefault(source if "://" in source else str(Path(source).resolve()), source)
    return [*once.values()]


def _copied(url: str, cache: Path) -> Path:
    try:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, OSError, ValueError) as error:
        raise RecordError(without_credentials(
            f"cannot open {url}: {error}. If a module is missing, install the project with its extra 'remote', as in "
            "pip install '.[remote]' in its folder")) from error
    folder = cache / hashlib.sha256(url.encode()).hexdigest()[:12]
    private_folder(folder)
    try:
        filesystem.invalidate_cache()
        present = set()
        for source, target, size in _wanted(filesystem, root, folder):
            present.add(target)
            if target.suffix == SUFFIX and target.exists() and target.stat().st_size == size:
                continue  # a shard never changes; the monitor's state does
            with replacing(target) as scratch:
                filesystem.get_file(source, str(scratch))
    except Exception as error:  # each kind of storage has its own exceptions
        raise RecordError(without_credentials(f"cannot read the records at {url}: {type(error).__name__}: {error}")
                          ) from error
    for kept in folder.rglob("*" + SUFFIX):
        if kept not in present:  # deleted by the retention of the server that wrote it
            kept.unlink()
    return folder


def _wanted(filesystem: Any, root: str, folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Yield the remote name, local path and size in bytes of each shard and of each monitor's state."""
    for name, about in filesystem.find(root, detail=True).items():
        path = PurePosixPath(os.path.relpath(name, root))
        if ".." not in path.parts and (path.suffix == SUFFIX or path.match(MONITOR_FILES)):
            yield name, folder / path, int(about["size"])
