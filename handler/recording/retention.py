"""The deletion of records that are too old or too many, by the workers, and by `ee-watch` where no worker runs."""

from __future__ import annotations

import logging
import re
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from early_exit.handler.errors import RecordError
from early_exit.handler.files.names import bare_name
from early_exit.handler.files.private import SCRATCH_SUFFIX
from early_exit.handler.recording.clock import SharedClock, in_order
from early_exit.handler.recording.format import SUFFIX

logger = logging.getLogger(__name__)

_ABANDONED_S = 3600.0
"""A file that a worker has not finished after this many seconds is taken to be abandoned."""
_BACKBONE = re.compile(r"[0-9a-f]+")
_SHARD = re.compile(r"(?P<worker>.+-\d+-\d+)-(?P<number>\d+)" + re.escape(SUFFIX))
_SCRATCH = re.compile(rf"\.{_SHARD.pattern}\.\w+" + re.escape(SCRATCH_SUFFIX))
_told = set[Path]()
"""The folders of which it was logged that files in them cannot be deleted."""
_File = tuple[Path, float, int]
"""The path of a file, the Unix time of its last change and its size in bytes."""


def shard_name(version: str, process: int, began_ns: int, number: int) -> str:
    """Return the file name of a shard. `enforce_limits` recognizes shards by this name.

    Args:
        version: version of the model.
        process: process id of the worker.
        began_ns: Unix time in nanoseconds at which the worker began to record.
        number: the number of shards that the worker has written before.
    """
    return f"{version}-{process}-{began_ns}-{number}{SUFFIX}"


def enforce_limits(root: Path, model: str, max_age_s: float, max_bytes: int) -> None:
    """Delete the shards of a model that are too old, and the oldest ones while all of them together are too large.

    Only files in the folders of the model's backbones are counted and deleted, and only if they have the name of a
    shard, or of a shard that a killed worker did not finish. If a file cannot be deleted, it is left for the next time,
    because workers share the folder, and a watcher may see it read-only. It still counts, so that the others are not
    too large together with it; but the newest shard is kept beside such files, or nothing would be recorded any more.
    If they alone are too large, a warning is logged, once per process. A jump of the clock deletes nothing, see
    `SharedClock`. In addition, the times of a worker's shards are corrected by their order.

    Args:
        root: the records folder.
        model: name of the model.
        max_age_s: the largest age of a shard, in seconds since it was written.
        max_bytes: the largest size of all shards together.

    Raises:
        RecordError: the name of the model leads out of the records folder.
    """
    folder = root / bare_name(model, "the name of a model with records", RecordError)
    shards = sorted(_dated([*_files(folder, _SHARD)]), key=lambda shard: shard[1])
    now = SharedClock(folder).now(newest=shards[-1][1] if shards else None)
    size = sum(n_bytes for _, _, n_bytes in shards)
    stuck: list[_File] = []
    deleted: list[Path] = []
    for shard in shards:
        path, written, n_bytes = shard
        is_newest_beside_stuck = bool(stuck) and shard is shards[-1]
        if now - written > max_age_s or (size > max_bytes and not is_newest_beside_stuck):
            if _is_deleted(path):
                size -= n_bytes
                deleted.append(path)
            else:
                stuck.append(shard)
    if deleted:  # a watcher that sees the folder read-only deletes nothing, and has nothing to tell
        _tell_once(folder, stuck, max_bytes)
    for path, modified, _ in _files(folder, _SCRATCH):
        if now - modified > _ABANDONED_S:
            _is_deleted(path)


def _tell_once(folder: Path, stuck: Sequence[_File], max_bytes: int) -> None:
    """Log that files which cannot be deleted leave no room for new shards, once for each folder."""
    if sum(n_bytes for _, _, n_bytes in stuck) >= max_bytes and folder not in _told:
        _told.add(folder)
        logger.warning("%d shards in %s cannot be deleted and are larger than early_exit.records_max_bytes, which is "
                       "%d, by themselves, so of all new shards only the newest is kept: delete them as their owner, "
                       "such as %s, or set a larger limit", len(stuck), folder, max_bytes, stuck[0][0])


def _dated(shards: Sequence[_File]) -> Iterator[_File]:
    """Yield shards with the times at which they were written, corrected for changes of the clock."""
    by_worker: dict[tuple[Path, str], list[tuple[int, _File]]] = defaultdict(list)
    for shard in shards:
        if name := _SHARD.fullmatch(shard[0].name):
            by_worker[shard[0].parent, name["worker"]].append((int(name["number"]), shard))
    for numbered in by_worker.values():
        ordered = [shard for _, shard in sorted(numbered)]
        for (path, _, n_bytes), written in zip(ordered, in_order([modified for _, modified, _ in ordered])):
            yield path, written, n_bytes


def _files(folder: Path, name: re.Pattern[str]) -> Iterator[_File]:
    """Yield the files whose names match a pattern."""
    for backbone in _entries(folder):
        if _BACKBONE.fullmatch(backbone.name):
            for path in _entries(backbone):
                if name.fullmatch(path.name):
                    try:
                        about = path.lstat()
                    except OSError:  # another worker was faster
                        continue
                    if stat.S_ISREG(about.st_mode):
                        yield path, about.st_mtime, about.st_size


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder; none if it does not exist or is a link."""
    try:
        return [] if folder.is_symlink() else list(folder.iterdir())
    except OSError:  # nothing was recorded yet, the folder was deleted, or this is not a folder
        return []


def _is_deleted(path: Path) -> bool:
    """Delete a file; return whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
