"""Archives for a server that a test starts, and for tests of what is written into one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

from early_exit.archiver.packaging import archive
from early_exit.archiver.packaging.request import ArchiveRequest


def build_untried(asked: ArchiveRequest, log: Callable[[str], None] = lambda line: None) -> Path:
    """Build an archive without the ten seconds in which `ee-archive` loads and runs it.

    A server does that next; where there is none, other tests try out such archives.
    """
    with mock.patch.object(archive, "check", return_value={}):
        return archive.build_archive(asked, log)
