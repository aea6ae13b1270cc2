"""Reads backbones, those of detectors with the parts that their graphs call."""

from __future__ import annotations

from pathlib import Path

import torch

from early_exit.handler.archive_layout import DESCRIPTION_FILE
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.detection.detector import load_tail


def load_backbone(folder: Path, device: torch.device | str = "cpu") -> Backbone:
    """Read the backbone that `Backbone.save` wrote into a folder, onto a device.

    Raises:
        ArchiveError: the files are damaged.
        FormatError: their format is not one that this version reads.
    """
    description = BackboneDescription.load(folder / DESCRIPTION_FILE)
    if description.detector is not None:
        load_tail(description.detector, folder, description.input_shape)
    return Backbone.read_program(folder, description, device)
