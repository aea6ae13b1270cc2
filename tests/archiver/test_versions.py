"""The versions of a model in its store are found by the names of its archives alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from early_exit.archiver.watch.versions import next_version, stored_versions


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for name in ("cifar-2.0", "cifar-10.0", "cifar-latest", "cifar-10-7.0", "other-9.0", "2024", "cifar"):
        (tmp_path / f"{name}.mar").touch()
    return tmp_path


def test_archives_of_other_models_and_versions_that_are_no_numbers_are_none_of_this_model(store: Path) -> None:
    assert stored_versions(store, "cifar") == {2.0: store / "cifar-2.0.mar", 10.0: store / "cifar-10.0.mar"}
    assert stored_versions(store, "cifar-10") == {7.0: store / "cifar-10-7.0.mar"}


@pytest.mark.parametrize(("model", "registered", "expected"), [
    ("cifar", ["2.0"], "11.0"), ("cifar", ["30.5", "canary"], "31.0"), ("new", [], "1.0")])
def test_the_next_version_replaces_neither_an_archive_nor_a_registered_version(
        model: str, registered: list[str], expected: str, store: Path) -> None:
    assert next_version(store, model, registered) == expected
