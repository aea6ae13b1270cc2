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
    """Run the command line of this process anew, unless the process has the allocator already.

    What is measured in it then holds for the server's workers. Modules are found where this process finds them: with
    `python -m` instead, whoever put a file into the current folder would run code.
    """
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def return_freed_memory() -> None:
    """Give back to the system what loading a model has freed: the settings above keep it, but no batch needs it."""
    gc.collect()  # graphs refer to their modules and back
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
