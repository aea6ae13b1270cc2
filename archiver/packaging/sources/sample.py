"""A sample request: it tells the shape that a handler feeds its model, and proves a new archive."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone, BackboneDescription
from early_exit.handler.errors import ArchiveError, InputError
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


def probed_by_sample(backbone: Backbone, layout: ArchiveLayout, manifest: dict[str, Any],
                     sample: bytes | None) -> Backbone:
    """Return a backbone whose probe is what the handler makes of the sample, where it makes one row of it.

    A backbone that was read from an archive keeps its probe, which tells whether its weights are still what they were.

    Raises:
        ArchiveError: no score of the probe is a number, so it could not tell whether the weights are damaged.
    """
    if backbone.folder is not None:
        return backbone
    if sample is not None:
        try:
            with preprocessing(layout.root, manifest) as handler:
                backbone = backbone.probed_by(handler.model_inputs([sample], backbone.description.inputs))
        except (ArchiveError, InputError):  # as of a handler that makes several rows: an input of ours must do
            pass
    scores = torch.tensor(backbone.description.probe)
    if not bool(scores.isfinite().any()) or bool(scores.isnan().any()):
        tried = "for the sample request" if sample is not None else "on any input that was tried"
        raise ArchiveError(f"the model's scores {tried} are not numbers ({scores.tolist()[:5]}), so damaged weights could "
                           "not be told from sound ones: pass --request FILE with a typical request")
    return backbone


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
