"""The writer of records while the model serves. It never makes an answer fail, and never delays one."""

from __future__ import annotations

import errno
import logging
import math
import os
import platform
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from early_exit.handler.config import ServingConfig
from early_exit.handler.recording.content import ContentKey
from early_exit.handler.recording.format import Records, ShardHeader, write_shard
from early_exit.handler.recording.retention import enforce_limits, shard_name

logger = logging.getLogger(__name__)

_SHARDS_IN_MEMORY = 4
_RETRY_S = 5.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TELL_EVERY_S = 60.0


@dataclass(frozen=True)
class _Gap:
    """Records that were dropped: their number, and the Unix times of the first and of the last of them."""

    n: int = 0
    first: float = 0.0
    last: float = 0.0

    def __add__(self, later: _Gap) -> _Gap:
        if not self.n or not later.n:
            return self if self.n else later
        return _Gap(self.n + later.n, min(self.first, later.first), max(self.last, later.last))


class RecordWriter:
    """Takes records from the serving thread and writes them as shards from a thread of its own.

    TorchServe ends workers with SIGKILL, so a worker loses at most its unsealed shard. While the disk is full, shards
    wait in memory, up to a bound, and writing is retried. If the folder cannot be written for another reason, the
    shards are dropped.
    """

    def __init__(self, root: Path, header: ShardHeader, config: ServingConfig) -> None:
        self._root, self._config = root, config
        self.contents = ContentKey(root)
        """Hashes the contents of the offered records."""
        self._queue: queue.SimpleQueue[Records | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._written = 0
        self._dropped = 0
        self._not_finite = self._not_finite_counted = 0
        self._not_finite_told = False
        self._failing_since: float | None = None
        self._lost = 0
        """The number of records dropped since writing began to fail."""
        self._untold = _Gap()
        """The dropped records that no sealed shard tells of yet."""
        self._told = -math.inf
        self._retry_at = math.inf
        self._sealed: deque[tuple[Records, _Gap]] = deque()
        """Shards that wait to be written, oldest first, each with the records that were dropped before it."""
        self._began_ns, self._n_shards = time.time_ns(), 0
        self._header = replace(header, worker=f"{os.getpid()}-{self._began_ns}", host=platform.node())
        self._thread = threading.Thread(target=self._run, name="early-exit-records", daemon=True)
        self._thread.start()

    def offer(self, records: Records) -> None:
        """Queue records; if the disk does not keep up, they are dropped and counted."""
        with self._lock:
            is_full = self._waiting >= _SHARDS_IN_MEMORY * self._config.records_per_shard
            if is_full:
                self._lose(len(records))
            else:
                self._waiting += len(records)
        if not is_full:
            self._queue.put(records)

    def take_not_finite(self) -> int:
        """Return how many records had scores that are not finite and predict no class, since the last call."""
        with self._lock:
            count, self._not_finite_counted = self._not_finite_counted, 0
        return count

    def drop(self, n_records: int, error: Exception) -> None:
        """Count records that could not be created, and log the error."""
        self._tell(error, n_records)
        with self._lock:
            self._lose(n_records)

    def take_counts(self) -> tuple[int, int]:
        """Return how many records were written, and how many were dropped, since the last call."""
        with self._lock:
            counts = self._written, self._dropped
            self._written = self._dropped = 0
        return counts

    def close(self) -> None:
        """Seal the queued records and stop; records that cannot be written now are dropped."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        parts: list[Records] = []
        seal_at = math.inf
        while True:
            wake_at = min(seal_at, self._retry_at)
            try:
                item = self._queue.get(timeout=max(0.0, min(wake_at - time.monotonic(), 3600.0)))
            except queue.Empty:
                if not parts and wake_at == math.inf:
                    self._enforce_limits()  # records become too old without traffic, too
            else:
                if item is None:
                    self._seal(parts)
                    self._give_up()
                    return
                if not parts:
                    seal_at = time.monotonic() + self._config.seal_after_s
                parts.append(item)
            if sum(map(len, parts)) >= self._config.records_per_shard or time.monotonic() >= seal_at:
                self._seal(parts)
                parts, seal_at = [], math.inf
            elif time.monotonic() >= self._retry_at:
                self._write_sealed()

    def _seal(self, parts: list[Records]) -> None:
        if n_records := sum(map(len, parts)):
            try:
                records = self._usable(Records.concatenate(parts))
                with self._lock:
                    gap, self._untold = self._untold, _Gap()
                self._sealed.append((records, gap))
            except Exception as error:  # no error may stop this thread
                self._tell(error, n_records)
                self._done(n_records, written=False)
        self._write_sealed()

    def _usable(self, records: Records) -> Records:
        """Return the records whose scores predict a class, and count the others, of which no certificate can tell."""
        usable = records.predict()
        if not (n := len(usable) - int(usable.sum())):
            return records
        if not self._not_finite_told:
            logger.warning("%d of %d requests have scores that are not finite and predict no class: such requests are "
                           "answered and counted, but not recorded, and no certificate is about them", n, len(usable))
        self._not_finite_told = True
        with self._lock:
            self._waiting -= n
            self._not_finite += n
            self._not_finite_counted += n
        return records.where(usable)

    def _write_sealed(self) -> None:
        """Write the waiting shards, oldest first, until the disk is full."""
        self._retry_at = math.inf
        while self._sealed:
            records, gap = self._sealed[0]
            if not len(records):
                with self._lock:
                    self._untold = gap + self._untold
                self._sealed.popleft()
                continue
            name = shard_name(self._header.version, os.getpid(), self._began_ns, self._n_shards)
            try:
                n_skipped = self._not_finite
                header = replace(self._header, content_key=self.contents.name, n_not_finite=n_skipped,
                                 n_dropped=gap.n, dropped=(gap.first, gap.last))
                write_shard(header.folder(self._root) / name, header, records)
            except Exception as error:  # no error may stop this thread
                if isinstance(error, OSError) and error.errno in _FULL:
                    self._retry_at = time.monotonic() + _RETRY_S
                    self._tell(error)
                    break
                self._tell(error, len(records))
                self._done(len(records), written=False)
                with self._lock:
                    self._untold = gap + self._untold
            else:
                self._n_shards += 1
                self._not_finite -= n_skipped
                self._done(len(records), written=True)
                self._tell_if_mended()
            self._sealed.popleft()
        self._enforce_limits()

    def _done(self, n_records: int, *, written: bool) -> None:
        with self._lock:
            self._waiting -= n_records
            if written:
                self._written += n_records
            else:
                self._lose(n_records)

    def _lose(self, n_records: int) -> None:
        """Count dropped records; the caller holds the lock."""
        self._dropped += n_records
        self._lost += n_records
        self._untold += _Gap(n_records, time.time(), time.time())

    def _give_up(self) -> None:
        self._done(sum(len(records) for records, _ in self._sealed), written=False)
        self._sealed.clear()

    def _tell(self, error: Exception, n_lost: int = 0) -> None:
        """Log that records cannot be written, at most once a minute."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            logger.warning("cannot write records to %s: %s. %d records wait in memory, and %d were dropped so far. "
                           "Requests are still answered, and recording resumes as soon as records can be written.",
                           self._root, error, self._waiting, self._lost + n_lost)

    def _tell_if_mended(self) -> None:
        if self._failing_since is not None:
            logger.warning("records are written to %s again, after %.0f s in which %d records were dropped", self._root,
                           time.monotonic() - self._failing_since, self._lost)
            self._failing_since, self._lost, self._told = None, 0, -math.inf

    def _enforce_limits(self) -> None:
        try:
            enforce_limits(self._root, self._header.model, self._config.records_max_age_s,
                           self._config.records_max_bytes)
        except Exception:  # no error may stop this thread
            logger.exception("cannot delete records that are too old or too many")
