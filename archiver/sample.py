"""A sample request: it tells the shape that a handler feeds its model, and proves a new archive."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.errors import ArchiveError
from early_exit.handler.inner import load_inner_handler
from early_exit.training.requests import importing_from, worker_context


class _ModelReached(BaseException):
    """Carries the first batch out of a handler, past any 'except Exception' of its own."""

    def __init__(self, batch: object) -> None:
        self.batch = batch


class _Messenger(nn.Module):
    def forward(self, batch: Tensor) -> Tensor:
        raise _ModelReached(batch)


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
    logging.getLogger("ts").setLevel(logging.ERROR)  # it warns of every optional backend that is not installed
    context = worker_context(folder, manifest)
    working_directory = Path.cwd()
    os.chdir(folder)  # a TorchServe worker runs in the folder of its model
    try:
        with importing_from(folder):
            handler = load_inner_handler(manifest, context, _Messenger())
            handler.handle([{"body": request}], context)
    except _ModelReached as reached:
        if not isinstance(reached.batch, Tensor):
            raise ArchiveError(f"expected the handler to give its model one tensor, found "
                               f"{type(reached.batch).__name__}") from None
        if len(reached.batch) != 1:
            raise ArchiveError(f"the handler makes {len(reached.batch)} rows of one request, so requests could not be "
                               "told apart in a batch: it must make one") from None
        return tuple(reached.batch.shape[1:]), reached.batch.dtype
    except ArchiveError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ArchiveError(
            f"cannot tell the model's input shape: {manifest['model']['handler']} fails on the sample request with "
            f"{type(error).__name__}: {error}. Pass --input-shape C,H,W or --request FILE with a typical request"
        ) from error
    finally:
        os.chdir(working_directory)
    raise ArchiveError(f"{manifest['model']['handler']} answered the sample request without calling self.model: pass "
                       "--request FILE with a typical request")
