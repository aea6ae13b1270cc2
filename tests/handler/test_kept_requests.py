"""A kept request holds exactly what the handler got, whatever that was."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from early_exit.handler.call import Call
from early_exit.handler.config import ServingConfig
from early_exit.handler.model.loading import build_model
from early_exit.handler.recording.format import list_shards, read_shard, request_hash
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.handler.sample_request import Part, SampleRequest
from early_exit.training.data.dataset import load_traffic
from tests.support.host import MemoryHost, worker_of
from tests.support.row_handlers import AtOnce, backbone_of_rows, requests

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                    max_leaves=12)
RAW = st.binary(max_size=40) | st.binary(max_size=40).map(bytearray)
PARTS = st.dictionaries(st.text(), st.tuples(RAW | st.text() | JSON, st.text()), max_size=4)
INSTANCES = RAW | st.text() | st.lists(RAW | JSON, max_size=3) | st.dictionaries(st.text(), RAW | JSON, max_size=3)


def told(value: Any) -> str:
    """Return a text that differs if types or values differ; `==` cannot tell 1, 1.0 and True apart, nor match NaNs."""
    if isinstance(value, dict):
        return f"{type(value)} {[(key, told(inner)) for key, inner in value.items()]}"
    if isinstance(value, list):
        return f"{type(value)} {[told(inner) for inner in value]}"
    return f"{type(value)} {value!r}"


@given(parts=PARTS)
def test_parts_come_back_as_they_were_handed_over(parts: dict[str, tuple[Any, str]]) -> None:
    request = KeptRequest({name: value for name, (value, _) in parts.items()},
                          {name: content_type for name, (_, content_type) in parts.items()})
    again = KeptRequest.from_bytes(request.to_bytes())
    assert told(again.item) == told(request.item) and again.content_types == request.content_types


@given(instance=INSTANCES)
def test_an_instance_need_not_be_a_dict_of_parts(instance: Any) -> None:
    assert told(KeptRequest.from_bytes(KeptRequest(instance).to_bytes()).item) == told(instance)


@given(value=st.binary(max_size=60) | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()),
       content_type=st.sampled_from(["application/json", "text/plain", "image/png", ""]))
def test_whatever_torchserve_makes_of_a_body_can_be_kept(value: bytes, content_type: str) -> None:
    inputs = SampleRequest((Part(value, content_type),)).inputs()
    assert told(KeptRequest.from_bytes(KeptRequest(inputs).to_bytes()).item) == told(inputs)


def test_bytes_are_kept_as_they_are() -> None:
    raw = bytes(range(256)) * 1000
    kept = KeptRequest({"image": raw, "mask": bytearray(raw)}, {"image": "image/png"}).to_bytes()
    assert kept.endswith(raw + raw) and len(kept) < 2 * len(raw) + 200


@pytest.mark.parametrize("damage", [lambda kept: kept[:-1], lambda kept: kept[1:], lambda kept: b"", lambda kept: b"\n",
                                    lambda kept: kept.replace(b'"bytes"', b'"words"')])
def test_what_is_damaged_is_no_request(damage: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, IndexError)):
        KeptRequest.from_bytes(damage(KeptRequest({"image": b"12345"}).to_bytes()))


def test_a_worker_records_what_its_handler_got_and_says_what_cannot_be_kept(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = requests(3)
    given = [{"rows": rows[0], "image": bytearray(b"\x89PNG"), "text": "dog", "options": {"k": [1, None]}},
             {"rows": rows[1], "object": object()}, {"rows": rows[2]}]
    headers = {"accept": "*/*", "image": {"content-type": "image/png"}, "options": {"content-type": "application/json"}}
    model = build_model(backbone_of_rows(), sampling_rate=1.0)
    worker = worker_of(model, AtOnce(model), ServingConfig(records=str(tmp_path), keep_requests=True), MemoryHost())
    with caplog.at_level(logging.WARNING):
        worker.step([Call(f"id-{number}", inputs, headers) for number, inputs in enumerate(given)])
        worker.close()
    assert caplog.text.count("a request with object at object cannot be kept") == 1
    [shard] = list_shards(tmp_path)
    [(start, kept)] = load_traffic([shard]).kept()
    types = {"image": "image/png", "options": "application/json"}
    assert (start, kept) == (0, [KeptRequest(given[0], types), None, KeptRequest(given[2], types)])
    assert kept[0] is not None and type(kept[0].item["image"]) is bytearray
    again = kept[0].call("again")
    assert (again.id, again.inputs, again.headers) == (
        "again", given[0], {"image": {"content-type": "image/png"}, "options": {"content-type": "application/json"}})
    records = read_shard(shard, [])
    assert records.request.tolist() == [request_hash(f"id-{number}") for number in range(3)]
    assert records.row.tolist() == [0, 0, 0] and records.row.dtype is torch.int32
