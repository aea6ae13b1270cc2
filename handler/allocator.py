"""The memory allocator that the model runs with.

By default, glibc returns large blocks to the system after every batch, and page faults that get them back take a third
of the CPU time. With the settings in this module, glibc keeps the blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Environment variables that glibc's malloc reads when a process starts."""


def restart_with_allocator() -> None:
    """Restart this process with its own command line, unless it has these settings already.

    Measurements in this process are then valid for the server's workers. The new process searches for modules in the
    same folders as this one. With `python -m` instead, it would also search the current folder, where somebody could
    have put a file, which would run as code.
    """
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def return_freed_memory() -> None:
    """Return memory that was freed while a model was loaded to the system; malloc would keep it, but no batch needs it.
    """
    gc.collect()  # graphs and their modules refer to each other
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
