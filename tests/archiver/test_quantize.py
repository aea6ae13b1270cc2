"""What 8 bits are calibrated with."""

from __future__ import annotations

from pathlib import Path

import torch

from early_exit.archiver.quantize import recorded_inputs
from early_exit.handler.backbone import Backbone
from early_exit.handler.layout import ArchiveLayout
from early_exit.handler.records import list_shards
from early_exit.training.dataset import Part, load_traffic
from tests.support.images import MANIFEST, SHAPE, image_model, record_images, write_handler


def test_only_requests_of_the_train_part_calibrate(tmp_path: Path) -> None:
    backbone, layout = Backbone.from_module(image_model(), SHAPE), ArchiveLayout(tmp_path / "archive")
    layout.root.mkdir()
    write_handler(layout.root)
    images = record_images(backbone, 700, tmp_path / "records")
    is_train = load_traffic(list_shards(tmp_path / "records")).part == list(Part).index(Part.TRAIN)
    inputs = recorded_inputs(tmp_path / "records", layout, MANIFEST, backbone)
    assert len(inputs) == 300
    assert torch.equal(inputs, images[is_train][:300])
