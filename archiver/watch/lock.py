"""The lock that keeps two watchers of one model apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from early_exit.handler.errors import ServerError
from early_exit.handler.files.private import open_private


@contextlib.contextmanager
def only_watcher(path: Path) -> Iterator[None]:
    """Hold a lock while the block runs; the kernel frees it when the process ends, however it ends.

    Raises:
        ServerError: another process holds the lock.
        ForeignFileError: the file is a link, or belongs to somebody else.
    """
    with open_private(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ServerError(f"another ee-watch (process {file.read().strip() or 'unknown'}) watches this model: "
                              f"{path} is locked") from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
