"""The content of a record: equal contents have equal hashes, and a hash reveals nothing without the key."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import ForeignFileError, RecordError
from early_exit.handler.model.loading import build_model
from early_exit.handler.recording.content import KEY_FILE, UNKNOWN_CONTENT, ContentKey
from early_exit.handler.recording.format import list_shards, read_header, read_shard
from tests.support.host import MemoryHost, worker_of
from tests.support.residual import recorded_inputs, residual_backbone

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
ITEMS = st.recursive(SCALARS | st.binary(max_size=8) | st.binary(max_size=8).map(bytearray),
                     lambda inner: st.lists(inner, max_size=3)
                     | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8)


def canonical(item: Any) -> str:
    """Return a text that is equal for two items if their contents are equal; it does not use the hash."""
    def named(value: Any) -> Any:
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": value.hex()}
        if isinstance(value, dict):
            return {"object": {key: named(inner) for key, inner in value.items()}}
        return [*map(named, value)] if isinstance(value, list) else {"scalar": json.dumps(value)}

    return json.dumps(named(item), sort_keys=True)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> ContentKey:
    return ContentKey(tmp_path_factory.mktemp("records"))


@given(ITEMS, ITEMS)
def test_hashes_are_equal_where_contents_are_and_nowhere_else(key: ContentKey, first: Any, second: Any) -> None:
    assert (key.hash(first) == key.hash(second)) == (canonical(first) == canonical(second))


def test_the_order_of_names_and_whether_bytes_can_be_changed_do_not_count(key: ContentKey) -> None:
    first, second = {"a": b"12", "b": [1, None]}, {"b": [1, None], "a": bytearray(b"12")}
    assert key.hash(first) == key.hash(second)


@pytest.mark.parametrize(("first", "second"), [
    ([b"ab", b"c"], [b"a", b"bc"]), ({"a": "1"}, {"a": 1}), ([["a"], "b"], [["a", "b"]]), (b"1", "1"), (1, True),
    ([1.0, 2.0], [1.0, 2]), ([1.0, 2.0], [[1.0], [2.0]]), ([0.0], [-0.0]), ([1, None], ["1", None]), ([], ""),
    ([1], "[1]"), ([[1.5], [2.5]], [[1.5, 2.5]])])
def test_what_only_looks_alike_is_told_apart(key: ContentKey, first: Any, second: Any) -> None:
    assert key.hash(first) != key.hash(second)


@pytest.mark.parametrize("item", [{"x": object()}, {1: "a"}, (1, 2), torch.ones(2)])
def test_what_is_no_json_with_bytes_has_no_known_content(key: ContentKey, item: Any) -> None:
    assert key.hash(item) == UNKNOWN_CONTENT


def test_an_image_as_lists_of_numbers_or_as_text_costs_little_more_than_its_bytes(key: ContentKey) -> None:
    row = [number / 7 for number in range(224)]
    for item in ([[row] * 224] * 3, "A" * 10_000_000):
        seconds = []
        for _ in range(5):
            began = time.thread_time()
            key.hash({"instances": [{"data": item}]})
            seconds.append(time.thread_time() - began)
        assert min(seconds) < 0.06, "number by number it takes half a second"


def test_another_key_gives_other_hashes_and_has_another_name(tmp_path: Path, key: ContentKey) -> None:
    other = ContentKey(tmp_path)
    assert other.hash(b"an image") != key.hash(b"an image") and other.name != key.name


def test_all_who_record_in_a_folder_have_one_key_whoever_is_first(tmp_path: Path) -> None:
    keys = [ContentKey(tmp_path / "records") for _ in range(16)]
    begin, names = threading.Barrier(len(keys)), []

    def use(key: ContentKey) -> None:
        begin.wait()
        names.append(key.name)

    threads = [threading.Thread(target=use, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 16 and len(set(names)) == 1
    assert [file.name for file in (tmp_path / "records").iterdir()] == [KEY_FILE]


def test_a_worker_puts_its_key_back_when_somebody_emptied_the_folder(tmp_path: Path) -> None:
    key = ContentKey(tmp_path)
    before = key.hash(b"an image"), key.name
    (tmp_path / KEY_FILE).unlink()
    assert key.name == before[1]
    assert ContentKey(tmp_path).hash(b"an image") == before[0]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_links_has_a_key_too(
        number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*names: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("early_exit.handler.recording.content.os.link", no_link)
    hashed = ContentKey(tmp_path).hash(b"an image")
    assert ContentKey(tmp_path).hash(b"an image") == hashed
    [file] = tmp_path.iterdir()
    assert file.name == KEY_FILE and file.stat().st_mode & 0o777 == 0o600


def test_the_key_is_the_users_alone(tmp_path: Path) -> None:
    ContentKey(tmp_path).hash(b"")
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600


def test_a_damaged_key_says_what_to_do_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(RecordError, match=r"holds 5 bytes, expected a key of 32: delete it"):
        ContentKey(tmp_path).hash(b"")
    (tmp_path / KEY_FILE).unlink()
    (tmp_path / KEY_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForeignFileError, match="symbolic link"):
        ContentKey(tmp_path).hash(b"")


def test_equal_requests_are_known_whatever_batch_worker_or_version_they_came_in(tmp_path: Path) -> None:
    config = ServingConfig(records=str(tmp_path), records_per_shard=100)
    bodies = [b"cat", b"dog", b"cat", b"bird"]
    for version in ("1.0", "2.0"):
        model = build_model(residual_backbone(), sampling_rate=1.0, record_layers=4, record_pool=4)
        worker = worker_of(model, config=config, host=MemoryHost(version=version))
        rows = recorded_inputs()[:4]
        calls = [Call(f"{version}-{number}", {"body": body}, {"rows": (rows[number],)})
                 for number, body in enumerate(bodies)]
        worker.step(calls[:3])
        worker.step(calls[3:])
        worker.close()
    records = [read_shard(shard, []) for shard in list_shards(tmp_path)]
    contents = [part.content.tolist() for part in records]
    assert contents[0] == contents[1]
    cat, dog, again, bird = contents[0]
    assert cat == again and len({cat, dog, bird}) == 3
    assert [part.sequence.tolist() for part in records] == [[0, 1, 2, 3]] * 2
    assert len({read_header(shard).worker for shard in list_shards(tmp_path)}) == 2
    assert {read_header(shard).content_key for shard in list_shards(tmp_path)} == {ContentKey(tmp_path).name}
