"""The answers of a detector: full detections for images that reached the end, one object for those that left early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.backbone.image_class import CERTAIN
from early_exit.handler.protocol import FULL


def detections(stages: Sequence[int], labels: Tensor, confidence: Tensor, detected: Tensor, size: tuple[int, int],
               *, has_mask: bool) -> list[dict[str, Tensor]]:
    """Return for each image the result of a torchvision detector.

    An image that left early has one object, or none if its label is 0. The object has a label and a score; its box and
    its mask are NaN. A score below `CERTAIN` is raised to `CERTAIN`, so that no handler drops the object.

    Args:
        stages: for each of B images, the stage at which it left, or `FULL` if it did not leave.
        labels: (B,) int64 labels.
        confidence: (B,) confidences.
        detected: (W, N, 6 + M) detections of the images that did not leave, in order; not read if all left.
        size: (height, width) of the images.
        has_mask: whether the detector finds masks.
    """
    rows = iter(detected)
    return [_in_full(next(rows), size) if stage == FULL
            else _early(labels[number:number + 1], confidence[number:number + 1], size, has_mask=has_mask)
            for number, stage in enumerate(stages)]


def _in_full(detected: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    detected = detected[~detected[:, 0].isnan()]
    answer = {"boxes": detected[:, :4], "labels": detected[:, 4].long(), "scores": detected[:, 5]}
    if detected.shape[1] > 6:
        side = math.isqrt(detected.shape[1] - 6)
        answer["masks"] = paste_masks_in_image(detected[:, 6:].view(-1, 1, side, side), answer["boxes"], size)
    return answer


def _early(label: Tensor, confidence: Tensor, size: tuple[int, int], *,
           has_mask: bool) -> dict[str, Tensor]:
    label, confidence = label[label > 0], confidence[label > 0].clamp_min(CERTAIN)
    detected = {"boxes": confidence.new_full((len(label), 4), torch.nan), "labels": label, "scores": confidence}
    if has_mask:
        detected["masks"] = confidence.new_full((len(label), 1, *size), torch.nan)
    return detected


def with_nulls(response: Any) -> Any:
    """Return a response for JSON, with null for each box or mask that is NaN."""
    if isinstance(response, dict):
        return {name: with_nulls(value) for name, value in response.items()}
    if isinstance(response, list):
        values = [with_nulls(value) for value in response]
        # A whole box becomes null, not a list of four nulls; nulls that were there before stay.
        return None if values != response and all(value is None for value in values) else values
    return None if isinstance(response, float) and math.isnan(response) else response
