"""A sample request: it tells the shape that a handler feeds its model, and proves a new archive."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from early_exit.handler.errors import ArchiveError
from early_exit.training.data.preprocessing import preprocessing


def sample_image(side: int = 256) -> bytes:
    """Return a square PNG, the sample for handlers that read images."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def image_input(folder: Path, manifest: dict[str, Any]) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of one item for a handler that brings images of any size to one.

    Raises:
        ArchiveError: the handler reads no images, or gives them to its model at their own size.
    """
    found, other = (model_input(folder, manifest, sample_image(side)) for side in (256, 320))
    if found != other:
        raise ArchiveError(f"{manifest['model']['handler']} gives images to its model at their own size, so a sample "
                           "does not tell the model's input shape: pass --input-shape C,H,W, or --request FILE")
    return found


def model_input(folder: Path, manifest: dict[str, Any], request: bytes) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of one item as a handler gives it to its model for a request.

    Args:
        folder: an extracted archive.
        manifest: its manifest.
        request: body of a request.

    Raises:
        ArchiveError: the handler does not turn the request into one tensor for its model.
    """
    with preprocessing(folder, manifest) as handler:
        try:
            batch = handler.model_input([request])
        except ArchiveError as error:
            raise ArchiveError(f"cannot tell the model's input shape: {error}. Pass --input-shape C,H,W or --request "
                               "FILE with a typical request") from error
    return tuple(batch.shape[1:]), batch.dtype
