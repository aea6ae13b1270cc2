"""A sample request: it tells the shape that a handler feeds its model, and proves a new archive."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.errors import ArchiveError
from early_exit.training.data.preprocessing import preprocessing


def sample_request(file: Path | None, layout: ArchiveLayout, manifest: dict[str, Any],
                   description: BackboneDescription) -> bytes | None:
    """Return a request that reaches the model with the right shape, where one is known.

    Args:
        file: the user's own sample, which comes first.
        layout: the archive with the user's files; where the source has a sample, it comes next.
        manifest: the manifest that the user's handler expects.
        description: what is known of the backbone; an image is the last resort, if the model takes one.
    """
    if file is not None:
        return file.read_bytes()
    if layout.sample_request.exists():
        return layout.sample_request.read_bytes()
    if len(description.inputs) > 1 or not description.inputs[0].dtype.startswith("float"):
        return None
    image = sample_image(description.input_shape[-1])
    try:
        shape, _ = model_input(layout.root, manifest, image)
    except ArchiveError:  # not a handler of images: the probe must do
        return None
    return image if shape == description.input_shape else None


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
    smaller, larger = (model_input(folder, manifest, sample_image(side)) for side in (256, 320))
    if smaller != larger:
        raise ArchiveError(f"{manifest['model']['handler']} gives images to its model at their own size, so a sample "
                           "does not tell the model's input shape: pass --input-shape C,H,W, or --request FILE")
    return smaller


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
