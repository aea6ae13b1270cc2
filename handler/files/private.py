"""Files and folders of this user alone: nobody else may read them, and those that belong to others are refused."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from early_exit.handler.errors import ForeignFileError

SCRATCH_SUFFIX = ".writing"
"""The suffix of files that are being written and have not been renamed into place yet."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""The errors of `link` on file systems without hard links, such as FAT, SMB and mounted buckets."""
_ROOT = 0


def open_private(path: Path, mode: str) -> IO[Any]:
    """Open a file that belongs to this user or to root, in a mode of `open`; a new file gets the mode 0600.

    Owner and kind are checked on the opened file, so nobody can exchange the file in between. Nothing in the file is
    changed before this check.

    Raises:
        ForeignFileError: the file belongs to somebody else, is a symbolic link, or is not a regular file.
        OSError: the file cannot be opened.
    """
    return open(path, mode, opener=_open_own)


def read_private(path: Path) -> str:
    """Return the text of a file that `open_private` opens."""
    with open_private(path, "r") as file:
        text: str = file.read()
    return text


def read_start(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a file that `open_private` opens, with as few system calls as possible."""
    descriptor = _open_own(str(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, n_bytes)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> Path:
    """Return a folder that belongs to this user or to root; missing folders of its path are created with mode 0700.

    Raises:
        ForeignFileError: the folder belongs to somebody else, who could exchange its contents.
        OSError: the folder cannot be created.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)  # one by one: `parents=True` would create parents by the umask
    _require_own(path, path.stat())
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file beside `path`, with mode 0600, that replaces `path` when the block ends without an error.

    The block writes into the file and must not move it. If `path` is a link, the link is replaced, not followed.

    Raises:
        ForeignFileError: the folder belongs to somebody else.
        OSError: the file cannot be created, or cannot replace `path`.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SCRATCH_SUFFIX, dir=private_folder(path.parent))
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _open_own(path: str, flags: int) -> int:
    try:
        # O_NONBLOCK, as somebody may have put a pipe there; a regular file never blocks.
        descriptor = os.open(path, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ForeignFileError(f"{path} is a symbolic link, expected a file of our own: links are not followed, "
                                   "as somebody else may have put it there. Name the file itself, or remove the "
                                   "link") from error
        raise
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ForeignFileError(f"{path} is no regular file, expected a file of our own: remove it")
        _require_own(Path(path), about)
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_own(path: Path, about: os.stat_result) -> None:
    own = os.geteuid()
    if about.st_uid not in (own, _ROOT):
        raise ForeignFileError(f"{path} belongs to user {about.st_uid}, expected user {own}, who runs this, or root: "
                               "somebody else may have put it there. Run as its owner, or remove it")
