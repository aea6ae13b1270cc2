"""Writes records while the model serves, without ever failing or delaying an answer."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from pathlib import Path

from early_exit.handler.config import ServingConfig
from early_exit.handler.recording.format import Records, ShardHeader, write_shard
from early_exit.handler.recording.retention import enforce_limits, shard_name

logger = logging.getLogger(__name__)

_SHARDS_IN_MEMORY = 4


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
                    self._enforce_limits()  # records grow too old without traffic, too
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
        name = shard_name(self._header.version, os.getpid(), time.time_ns(), self._n_shards)
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
        self._enforce_limits()
        with self._lock:
            self._waiting -= n_records
            if written:
                self._written += n_records
            else:
                self._dropped += n_records

    def _enforce_limits(self) -> None:
        enforce_limits(self._root, self._header.model, self._config.records_max_age_s, self._config.records_max_bytes)
