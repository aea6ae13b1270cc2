"""Records that are lost are told of by the next shard, whatever the reason, so that no certificate passes over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from early_exit.handler.config import ServingConfig
from early_exit.handler.recording.format import Records, list_shards, read_header
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.serving.recording import Recording
from tests.handler.test_records import HEADER, some_records


def test_a_shard_that_cannot_be_made_keeps_what_it_was_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=1))
    writer.close()  # ends its thread, so that shards are sealed here
    writer.drop(100, RuntimeError("no key"))
    with monkeypatch.context() as patch:
        patch.setattr(Records, "concatenate", staticmethod(raising(MemoryError("out of memory"))))
        writer._seal([some_records(2)])
    writer._seal([some_records(1)])
    [shard] = list_shards(tmp_path)
    assert read_header(shard).n_dropped == 102


def raising(error: Exception) -> Callable[..., NoReturn]:
    def fail(*arguments: object) -> NoReturn:
        raise error

    return fail


def test_records_that_cannot_be_made_for_any_reason_are_told_of_and_the_error_is_reported(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=1))
    part = SimpleNamespace(places=[0, 1, 2])
    served: Any = SimpleNamespace(calls=[0, 1, 2, 3])
    sampling: Any = SimpleNamespace(of=lambda served: SimpleNamespace(recorded=[part, part], served=served))
    model: Any = None
    recording = Recording(model, writer, sampling, keep_requests=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "_records", raising(torch.OutOfMemoryError("out of memory")))
        with pytest.raises(torch.OutOfMemoryError):
            recording.note(served)
    sampling.of = lambda served: SimpleNamespace(recorded=[part], served=served)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "_records", lambda part, sample: some_records(1))
        recording.note(served)
    writer.close()
    [shard] = list_shards(tmp_path)
    assert read_header(shard).n_dropped == 6 and recording._n_calls == 8


def test_requests_that_cannot_be_drawn_are_all_told_of(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, HEADER, ServingConfig(records_per_shard=1))
    served: Any = SimpleNamespace(calls=[0, 1, 2, 3])
    sampling: Any = SimpleNamespace(of=raising(MemoryError("out of memory")))
    model: Any = None
    recording = Recording(model, writer, sampling, keep_requests=False)
    for _ in range(3):
        with pytest.raises(MemoryError):
            recording.note(served)
    writer.offer(some_records(1))
    writer.close()
    [shard] = list_shards(tmp_path)
    assert read_header(shard).n_dropped == 12 and recording._n_calls == 12
