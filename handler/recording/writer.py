"""Writes records while the model serves, without ever failing or delaying an answer."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from pathlib import Path

from early_exit.handler.config import ServingConfig
from early_exit.handler.recording.format import SCRATCH_SUFFIX, SUFFIX, Records, ShardHeader, list_shards, write_shard

logger = logging.getLogger(__name__)

_SHARDS_IN_MEMORY = 4
_ABANDONED_S = 3600.0


class RecordWriter:
    """Takes records from the serving thread and writes them as shards from a thread of its own.

    TorchServe ends workers with SIGKILL, so a worker loses at most its unsealed shard.
    """

    def __init__(self, root: Path, header: ShardHeader, config: ServingConfig) -> None:
        self._root, self._header, self._config = root, header, config
        self._queue: queue.SimpleQueue[Records | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._written = 0
        self._dropped = 0
        self._failing = False
        self._n_shards = 0
        self._thread = threading.Thread(target=self._run, name="early-exit-records", daemon=True)
        self._thread.start()

    def offer(self, records: Records) -> None:
        """Queue records; they are dropped, and counted, when the disk does not keep up."""
        with self._lock:
            if self._waiting >= _SHARDS_IN_MEMORY * self._config.records_per_shard:
                self._dropped += len(records)
                return
            self._waiting += len(records)
        self._queue.put(records)

    def take_counts(self) -> tuple[int, int]:
        """Return the records written and dropped since the last call."""
        with self._lock:
            counts = self._written, self._dropped
            self._written = self._dropped = 0
        return counts

    def close(self) -> None:
        """Seal what is queued and stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        parts: list[Records] = []
        seal_at = float("inf")
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, min(seal_at - time.monotonic(), 3600.0)))
            except queue.Empty:
                item = None
                if not parts:
                    self._enforce_budget_quietly()  # records grow too old without traffic, too
                    continue
            else:
                if item is None:
                    self._seal(parts)
                    return
                if not parts:
                    seal_at = time.monotonic() + self._config.seal_after_s
                parts.append(item)
            if item is None or sum(map(len, parts)) >= self._config.records_per_shard:
                self._seal(parts)
                parts, seal_at = [], float("inf")

    def _seal(self, parts: list[Records]) -> None:
        n_records = sum(map(len, parts))
        if not n_records:
            return
        name = f"{self._header.version}-{os.getpid()}-{time.time_ns()}-{self._n_shards}{SUFFIX}"
        self._n_shards += 1
        written = False
        try:
            write_shard(self._header.folder(self._root) / name, self._header, Records.concatenate(parts))
            written, self._failing = True, False
        except Exception as error:  # nothing on the side may stop the recording thread or the answers
            if not self._failing:
                logger.warning("cannot write records to %s: %s. They are dropped until this is mended.",
                               self._root, error)
            self._failing = True
        self._enforce_budget_quietly()
        with self._lock:
            self._waiting -= n_records
            if written:
                self._written += n_records
            else:
                self._dropped += n_records

    def _enforce_budget_quietly(self) -> None:
        # Other workers delete and rename in the same folder; what vanished meanwhile is dealt with next time.
        with contextlib.suppress(OSError):
            self._enforce_budget()

    def _enforce_budget(self) -> None:
        """Delete this model's shards that are too old, then the oldest beyond the size budget."""
        folder = self._root / self._header.model
        now = time.time()
        shards = [(path, path.stat()) for path in list_shards(folder)]
        size = sum(stat.st_size for _, stat in shards)
        for path, stat in shards:
            if now - stat.st_mtime > self._config.records_max_age_s or size > self._config.records_max_bytes:
                path.unlink(missing_ok=True)
                size -= stat.st_size
        for scratch in folder.rglob("*" + SCRATCH_SUFFIX):  # left by a killed worker
            if now - scratch.stat().st_mtime > _ABANDONED_S:
                scratch.unlink(missing_ok=True)
