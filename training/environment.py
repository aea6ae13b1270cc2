"""The environment of processes that run an archive's code: variables that it needs, and none of the user's secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

GATEWAY_TOKEN = "EE_GATEWAY_TOKEN"
"""The token that clients of `ee-gateway` must send. No other process sees this variable."""
MORE_VARIABLES = "EE_ARCHIVE_ENV"
"""The names of further variables that `ee-archive` passes to the code of an archive, separated by commas."""
_NEEDED = re.compile(
    "PATH|HOME|TMPDIR|TZ|LANG|LC_.*|LD_LIBRARY_PATH|"  # a process, its files, its texts and its libraries
    "(OMP|MKL|OPENBLAS|NUMEXPR|KMP|GOMP)_.*|MALLOC_.*_|"  # threads and memory
    "CUDA_.*|NVIDIA_.*|PYTORCH_.*ALLOC_CONF|"  # the GPU
    "TORCH_HOME|TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR|HF_HOME|XDG_CACHE_HOME|"  # caches of models and kernels
    "HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE")


def minimal_environment() -> dict[str, str]:
    """Return the variables of this process that are no secrets, and those that the user named in EE_ARCHIVE_ENV.

    The list names the variables that are passed, because nobody can list all secrets: keys of clouds, registries,
    proxies and databases have names of their own.
    """
    named = {name.strip() for name in os.environ.get(MORE_VARIABLES, "").split(",")}
    return {name: value for name, value in os.environ.items() if _NEEDED.fullmatch(name) or name in named}


@contextmanager
def without_other_variables() -> Iterator[None]:
    """Run an archive's code in this process with the variables of `minimal_environment`.

    Libraries that read their settings from the environment, such as cloud clients, then do not see the user's secrets.
    Code that looks for the secrets still finds them in this process's memory; only a separate process has none.
    """
    before = dict(os.environ)
    kept = minimal_environment()
    try:
        for name in before.keys() - kept.keys():
            del os.environ[name]
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
