"""TorchServe's continuous batching, which lets a worker answer some requests of a batch later.

With `continuousBatching`, TorchServe calls the handler with all requests that have not been answered. Requests that the
handler removes from `context.request_ids` remain unanswered, and come again in the next call, together with new ones.
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from typing import Any, TextIO

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import ArchiveError, ConfigError

SERVER_SETTINGS = {"continuousBatching": True, "minWorkers": 1, "maxWorkers": 1}
"""The settings that early answers need in model-config.yaml. With two workers, TorchServe's continuous batching
deadlocks: one worker waits for a request and holds the lock that the other one needs to continue."""


def require_continuous_batching(model_config: Mapping[str, Any]) -> None:
    """Check that TorchServe is configured as early answers need it.

    Raises:
        ConfigError: model-config.yaml has other settings.
    """
    settings = {name: model_config.get(name) for name in SERVER_SETTINGS}
    if settings != SERVER_SETTINGS:
        raise ConfigError(f"early_exit.answers is 'early' in model-config.yaml, which requires {SERVER_SETTINGS} "
                          f"there, found {settings}: build the archive with ee-archive, which sets them")


def claim_only_worker(layout: ArchiveLayout) -> TextIO:
    """Return a locked file, which shows that a worker serves the version. Keep it open as long as this worker serves.

    Raises:
        ArchiveError: another worker serves the version already.
    """
    file = layout.manifest.open()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ArchiveError("early answers need exactly one worker of a version, and one serves already: scale the "
                           "version back to one worker (PUT /models/NAME?min_worker=1&max_worker=1)") from None
    return file
