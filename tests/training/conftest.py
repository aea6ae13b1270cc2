"""A small backbone, its archive and its records, which are made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from tests.support.recording import record
from tests.support.residual import recorded_inputs, residual_backbone


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return residual_backbone()


@pytest.fixture(scope="session")
def archive(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ArchiveLayout:
    layout = ArchiveLayout(tmp_path_factory.mktemp("archive"))
    layout.folder.mkdir()
    backbone.save(layout.folder)
    return layout


@pytest.fixture(scope="session")
def records(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for number, shard in enumerate(recorded_inputs().split(500)):
        record(backbone, shard, folder, first_request=500 * number)
    return folder
