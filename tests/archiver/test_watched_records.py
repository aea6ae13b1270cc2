"""Which records `ee-watch` counts, and what it says about the others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.publish import zip_folder
from early_exit.archiver.watch.status import ModelStatus, look
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import HANDLER, ArchiveLayout
from early_exit.handler.errors import ServerError
from early_exit.handler.recording.format import list_shards, read_header, read_shard, write_shard
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.training.data.traffic import traffic_of
from tests.support.recording import record
from tests.support.residual import recorded_inputs, residual_backbone
from tests.support.server_in_memory import ServerInMemory

N = 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model store with an archive whose traffic is known, and without records."""
    layout, model = ArchiveLayout(tmp_path / "archive"), {"modelName": "digits", "modelVersion": "2.0"}
    layout.folder.mkdir(parents=True)
    residual_backbone().save(layout.folder)
    layout.original_manifest.write_text(json.dumps({"model": {**model, "handler": "no_such_handler"}}))
    layout.manifest.parent.mkdir()
    layout.manifest.write_text(json.dumps({"model": {**model, "handler": HANDLER}}))
    HandlerDescription(files={}).save(layout.handler_description)
    (tmp_path / "store").mkdir()
    zip_folder(layout.root, tmp_path / "store" / "digits-2.0.mar")
    return tmp_path / "store"


def looked(store: Path, records: Path, lines: list[str], *more: Path) -> ModelStatus:
    server = ServerInMemory("server", store)
    server.register("digits-2.0.mar", RunSettings())
    return look(server, "digits", store, [*map(str, (records, *more))], store / "cache", lines.append)


def shard_of(folder: Path, traffic: str, **header: str) -> Path:
    """Record some requests, mark them as requests of that traffic, and return the shard."""
    record(residual_backbone(), recorded_inputs()[:N], folder, name="digits")
    shard = max(list_shards(folder), key=lambda path: path.stat().st_mtime_ns)
    found = read_header(shard)
    write_shard(shard, replace(found, traffic=traffic, **header), read_shard(shard, found.layers))
    return shard


def test_only_what_can_be_read_and_is_of_the_served_traffic_counts(store: Path, tmp_path: Path) -> None:
    records, traffic = tmp_path / "records", traffic_of(read_archive(store / "digits-2.0.mar"))
    own, _, damaged = (shard_of(records, of) for of in (traffic, "0" * 64, traffic))
    old = shard_of(records, "", content_key="")
    damaged.write_bytes(damaged.read_bytes()[:-40])
    lines: list[str] = []
    status = looked(store, records, lines)
    assert status.traffic == traffic
    assert set(status.shards) == {own, old} and len(status.times) == N, "the old one proves nothing"
    assert any(str(damaged) in line and line.endswith("It is skipped") for line in lines)
    assert any(line.startswith(f"{N} records are skipped: they are of other traffic") for line in lines)


def test_records_that_are_named_twice_or_copied_count_once(store: Path, tmp_path: Path) -> None:
    records, copy = tmp_path / "records", tmp_path / "copy"
    shard = shard_of(records, traffic_of(read_archive(store / "digits-2.0.mar")))
    shutil.copytree(records, copy)
    (tmp_path / "link").symlink_to(records)
    lines: list[str] = []
    status = looked(store, records, lines, records, tmp_path / "link", shard.parent.parent, copy)
    assert len(status.times) == N and status.shards == (shard,)
    half = copy / shard.relative_to(records)
    half.write_bytes(half.read_bytes()[:100])
    assert looked(store, copy, lines, records).shards == (shard,), "a copy that is not complete hides nothing"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_where_none_are_left_it_is_said_why(is_damaged: bool, store: Path, tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "records", "0" * 64)
    if is_damaged:
        shard.write_bytes(b"")
    lines: list[str] = []
    assert not looked(store, tmp_path / "records", lines).shards
    assert ("none of the 1 record shards can be read" if is_damaged else f"all {N} records are skipped: they are "
            "of other traffic") in lines[-1]


def test_before_the_first_shard_there_is_nothing_to_say(store: Path, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    lines: list[str] = []
    assert torch.equal(looked(store, tmp_path / "records", lines).times, torch.empty(0, dtype=torch.float64))
    assert not lines


@pytest.mark.parametrize("told", [("digits", "3.0"), ("faces", "2.0")])
def test_a_server_that_names_another_archive_than_it_serves_is_not_believed(
        told: tuple[str, str], store: Path, tmp_path: Path) -> None:
    """A compromised server could name an old archive, and all servers would then get a new one made from it."""
    (tmp_path / "records").mkdir()
    server, (model, version) = ServerInMemory("server", store), told
    server.register("digits-2.0.mar", RunSettings(), model=model)
    server.all[model] = {version: replace(server.all[model]["2.0"], version=version)}
    with pytest.raises(ServerError, match=f"says that it serves {model} {version} from digits-2.0.mar, but"):
        look(server, model, store, [str(tmp_path / "records")], store / "cache")
