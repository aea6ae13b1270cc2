"""The memory allocator that the model runs with.

By default glibc returns large blocks to the system after every batch, and a third of the CPU time goes into
page faults to get them back; these settings keep them.
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

    Measurements in this process then hold for the server's workers. The new process looks for modules where this one
    does: with `python -m` instead, a file that somebody put into the current folder could run as code.
    """
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def return_freed_memory() -> None:
    """Return to the system the memory that loading a model has freed: malloc would keep it, but no batch needs it."""
    gc.collect()  # graphs and their modules refer to each other
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
