"""An archive appears in a store complete, and never replaces another archive."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from early_exit.archiver.packaging.publish import publish
from early_exit.handler.errors import ArchiveError

ROUNDS = 20


def in_step(frame: FrameType, event: str, value: object) -> Any:
    """Pause before each line of `publish`, so that two threads that begin together go through it side by side."""
    if frame.f_code.co_filename != publish.__code__.co_filename:
        return None
    time.sleep(0.001)
    return in_step


def test_of_two_publishers_at_once_one_is_refused_every_time(tmp_path: Path) -> None:
    together = threading.Barrier(2)
    published: list[tuple[int, str]] = []

    def publish_all(name: str) -> None:
        sys.settrace(in_step)
        for number in range(ROUNDS):
            draft = tmp_path / f"{name}-{number}"
            draft.write_text(name)
            together.wait(30)
            try:
                publish(draft, tmp_path / f"{number}.mar")
            except ArchiveError:
                continue
            published.append((number, name))

    threads = [threading.Thread(target=publish_all, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for number, _ in published) == list(range(ROUNDS))
    assert all((tmp_path / f"{number}.mar").read_text() == name for number, name in published)


def without_links(source: object, target: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["with hard links", "without"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model store, once on a file system with hard links and once on one without."""
    if request.param == "without":
        monkeypatch.setattr(os, "link", without_links)
    (tmp_path / "draft").write_text("new")
    return tmp_path


def test_an_archive_appears_and_once_more_with_the_same_contents(store: Path) -> None:
    publish(store / "draft", store / "a.mar")
    publish(store / "draft", store / "a.mar")
    assert (store / "a.mar").read_text() == "new"


def test_another_archive_of_that_name_stays(store: Path) -> None:
    (store / "a.mar").write_text("old")
    with pytest.raises(ArchiveError, match="exists already with other contents"):
        publish(store / "draft", store / "a.mar")
    assert (store / "a.mar").read_text() == "old"


def test_a_link_in_the_place_of_an_archive_is_not_written_through(store: Path) -> None:
    (store / "a.mar").symlink_to(store / "nothing")
    with pytest.raises(ArchiveError, match="exists already"):
        publish(store / "draft", store / "a.mar")
    assert not (store / "nothing").exists()


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", without_links)
    (tmp_path / "draft").mkdir()  # a folder cannot be read as a file
    with pytest.raises(OSError):
        publish(tmp_path / "draft", tmp_path / "a.mar")
    assert not (tmp_path / "a.mar").exists()
