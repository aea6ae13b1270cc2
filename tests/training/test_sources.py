"""Records of several hosts are merged from local folders, a shared volume, and an S3 server on the loopback address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from early_exit.archiver.torchserve.addresses import free_ports
from early_exit.handler.errors import RecordError
from early_exit.handler.recording.format import Records, ShardHeader, list_shards, read_shard, write_shard
from early_exit.training.data.sources import local_folders

HEADER = ShardHeader("digits", "2.0", "ab12", 4, ("layer1",))


def write_records(root: Path, name: str, count: int) -> Path:
    path = HEADER.folder(root) / f"{name}.safetensors"
    write_shard(path, HEADER, Records(
        activations={"layer1": torch.randn(count, 3).half()}, log_probabilities=torch.randn(count, 4).half(),
        backbone_class=torch.zeros(count).int(), full_class=torch.zeros(count).int(),
        answered_class=torch.zeros(count).int(),
        exit=torch.zeros(count).short(), request=torch.randint(2**62, (count,)), row=torch.zeros(count).int(),
        content=torch.randint(2**62, (count,)), sequence=torch.arange(count),
        time=torch.zeros(count, dtype=torch.float64), sampling_rate=torch.ones(count)))
    return path


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield a URL on an S3 server that runs in this process."""
    import s3fs
    from moto.server import ThreadedMotoServer

    (port,) = free_ports(1)
    for name, value in (("AWS_ACCESS_KEY_ID", "testing"), ("AWS_SECRET_ACCESS_KEY", "testing"),
                        ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"),
                        ("NO_PROXY", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("records")
    try:
        yield "s3://records/host-b"
    finally:
        server.stop()


def test_a_folder_that_is_named_twice_or_by_a_link_is_one_source(tmp_path: Path) -> None:
    """Otherwise `ee-watch` counts the samples of its monitor twice, and accepts a version after half of its trial."""
    (tmp_path / "records").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "records")
    sources = [f"{tmp_path}/records", f"{tmp_path}/other", f"{tmp_path}/records/", f"{tmp_path}/link",
               f"{tmp_path}/other/../records"]
    assert local_folders(sources, tmp_path / "cache") == [tmp_path / "records", tmp_path / "other"]


def upload(folder: Path, url: str) -> None:
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.put_file(str(path), f"{root}/{path.relative_to(folder)}")


def n_records(folders: list[Path]) -> int:
    return sum(len(read_shard(shard, ["layer1"])) for folder in folders for shard in list_shards(folder))


def test_records_of_a_folder_and_of_an_s3_bucket_merge_and_stay_up_to_date(bucket: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write_records(here, "a", 3)
    gone = write_records(there, "b", 4)
    monitor = gone.parent / "monitor-2.0-cd.json"
    monitor.write_text(json.dumps({"step": 0}))
    (there / "secret.txt").write_text("not ours")
    upload(there, bucket)
    folders = local_folders([str(here), bucket], tmp_path / "cache")
    assert n_records(folders) == 7
    copied = HEADER.folder(folders[1])
    assert sorted(path.name for path in copied.iterdir()) == ["b.safetensors", "monitor-2.0-cd.json"]
    assert not list(folders[1].rglob("secret.txt"))

    unchanged = (copied / "b.safetensors").stat().st_mtime_ns
    write_records(there, "c", 5)
    monitor.write_text(json.dumps({"step": 1}))
    upload(there, bucket)
    assert n_records(local_folders([str(here), bucket], tmp_path / "cache")) == 12
    assert (copied / "b.safetensors").stat().st_mtime_ns == unchanged, "a shard is copied once"
    assert json.loads((copied / "monitor-2.0-cd.json").read_text()) == {"step": 1}

    import fsspec

    filesystem, root = fsspec.core.url_to_fs(bucket)
    filesystem.rm_file(f"{root}/{gone.relative_to(there)}")
    assert n_records(local_folders([str(here), bucket], tmp_path / "cache")) == 8


def test_a_url_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot open nonsense://bucket/records"):
        local_folders(["nonsense://bucket/records"], tmp_path)


def test_copies_of_records_are_private_to_the_user(tmp_path: Path) -> None:
    write_records(tmp_path / "there", "a", 1)
    (folder,) = local_folders([f"file://{tmp_path / 'there'}"], tmp_path / "cache")
    assert n_records([folder]) == 1
    assert folder.stat().st_mode & 0o077 == 0
