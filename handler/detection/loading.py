"""Reads backbones; for a detector, also the tail that its graph calls."""

from __future__ import annotations

from pathlib import Path

import torch

from early_exit.handler.archive_layout import DESCRIPTION_FILE
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.detection.detector import load_tail


def load_backbone(folder: Path, device: torch.device | str = "cpu") -> Backbone:
    """Read the backbone that `Backbone.save` wrote into a folder, and move it to a device.

    Raises:
        ArchiveError: the files are damaged.
        FormatError: this version does not read their format.
    """
    description = BackboneDescription.load(folder / DESCRIPTION_FILE)
    if description.detector is not None:
        load_tail(description.detector, folder, description.input_shape)
    return Backbone.read_program(folder, description, device)
