"""Archives that differ from others in a few entries."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from early_exit.handler.archive_layout import MANIFEST


def rewritten(mar: Path, target: Path, *, drop: str = "", **changed: bytes | Callable[[str], str]) -> Path:
    """Copy an archive without one entry, and with other entries changed or added.

    Args:
        mar: the archive to copy.
        target: the path of the copy.
        drop: the name of the entry to leave out.
        **changed: for the name of an entry, its new content, or a function that makes it from the present text.
    """
    with zipfile.ZipFile(mar) as source, zipfile.ZipFile(target, "w") as sink:
        for name in source.namelist():
            if name != drop and name not in changed:
                sink.writestr(name, source.read(name))
        for name, change in changed.items():
            sink.writestr(name, change(source.read(name).decode()) if callable(change) else change)
    return target


def renumbered(mar: Path, target: Path, before: str, after: str) -> Path:
    """Copy an archive as another version of it."""
    return rewritten(mar, target, **{MANIFEST: lambda text: text.replace(f'"{before}"', f'"{after}"')})
