"""Files of another user, and a umask that restricts nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SOMEBODY = 12345


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make another user the owner of a file. If this needs root, let this process appear to be another user instead."""
    if os.geteuid() == 0:
        os.chown(path, SOMEBODY, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)


@contextmanager
def open_umask() -> Iterator[None]:
    """Give files that are made in the block, even by child processes, all permissions that their creator asks for."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def open_to_others(folder: Path) -> list[Path]:
    """Return those paths, of the folder and all in it, that users other than the owner may read, write or search."""
    return [path for path in (folder, *folder.rglob("*")) if path.lstat().st_mode & 0o077 and not path.is_symlink()]
