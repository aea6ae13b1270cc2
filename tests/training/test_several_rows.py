"""A certificate for requests of several rows is about their rows, and `ee-train` says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import TooFewRecordsError
from early_exit.handler.recording.format import list_shards
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.support.recording import record


@pytest.mark.parametrize(("n_rows", "times"), [(None, 0), (1, 0), (10, 1)])
def test_it_is_told_that_a_certificate_is_about_rows(
        n_rows: int | None, times: int, backbone: Backbone, archive: ArchiveLayout, tmp_path: Path) -> None:
    layout, told = ArchiveLayout(tmp_path / "archive"), list[str]()
    shutil.copytree(archive.root, layout.root)
    HandlerDescription(rows_per_request=n_rows).save(layout.handler_description)
    record(backbone, torch.randn(20, *backbone.description.input_shape), tmp_path / "records")
    with pytest.raises(TooFewRecordsError):
        train("model", layout, list_shards(tmp_path / "records"), TrainingOptions(measure="flops", search=None),
              RunPaths(tmp_path / "run"), log=told.append)
    assert sum("the certificate is about rows, and up to 10 times as many requests" in line for line in told) == times
