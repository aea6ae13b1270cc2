"""A detector that detects objects without having been trained, images for it, and an exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan
from tests.support.models.small_detector import SmallDetector
from tests.support.plans import random_exits


def sure_detector() -> SmallDetector:
    torch.manual_seed(0)
    model = SmallDetector().eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight *= 30
    return model


def images(count: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return images of coloured patches with varied contrast, so that even an untrained network tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(count, 3, 5, 7, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    return functional.interpolate(patches, size=tuple(shape[1:]), mode="nearest")


def one_exit(backbone: Backbone, threshold: float) -> tuple[ExitPlan, dict[str, Head]]:
    """Return a plan with only the first of several untrained exits, because all rows would leave at the others."""
    plan, heads = random_exits(backbone, threshold=threshold)
    first = plan.exits[0].layer
    return replace(plan, exits=plan.exits[:1]), {first: heads[first]}
