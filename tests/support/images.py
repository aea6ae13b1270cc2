"""A small backbone for images, requests that hold raw images, and a user's handler that reads such requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from tests.support.recording import record

SHAPE = (3, 8, 8)
MANIFEST: dict[str, Any] = {"model": {"modelName": "model", "handler": "raw_images.py"}}
_HANDLER = """
import torch


class RawImages:
    def initialize(self, context):
        self.model = torch.nn.Identity()

    def handle(self, data, context):
        images = [torch.frombuffer(bytearray(row["body"]), dtype=torch.float32).view(3, 8, 8) for row in data]
        return self.model(torch.stack(images)).tolist()
"""


def image_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)).eval()


def write_handler(folder: Path) -> None:
    """Write the handler of `MANIFEST`."""
    (folder / "raw_images.py").write_text(_HANDLER)


def record_images(backbone: Backbone, count: int, folder: Path) -> Tensor:
    """Record requests with their bodies; return the (N, 3, 8, 8) images in them."""
    images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    record(backbone, images, folder, bodies=[image.numpy().tobytes() for image in images])
    return images
