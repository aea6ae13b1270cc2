"""A user's object detector as a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.image_class import DetectorSpec, Strategy
from early_exit.handler.detection.detector import Tail, detect, register
from early_exit.handler.errors import GraphError

PEDESTRIAN = 1
"""'person' among the labels of COCO."""


def is_detector(model: nn.Module) -> bool:
    """Tell whether a model is a two-stage detector of torchvision."""
    return all(hasattr(model, name) for name in ("transform", "backbone", "rpn", "roi_heads"))


def backbone_of_detector(detector: nn.Module, shape: Sequence[int] | None, strategy: Strategy | None, pedestrian: int,
                         model_file: str) -> Backbone:
    """Export a detector as a classifier of images.

    Args:
        detector: a detector of torchvision with two stages and a feature pyramid.
        shape: (C, H, W) of its images.
        strategy: how the class of an image is defined; by default as the class of its most confident object.
        pedestrian: the label of pedestrians.
        model_file: the name of the file in the user's archive with the class that makes the detector.

    Raises:
        GraphError: the detector is of another kind, or cannot be exported.
    """
    if shape is None:
        raise GraphError("a detector takes images of any size, but its stages take images of one size: pass "
                         "--input-shape C,H,W")
    model = ImageClass(detector, shape, strategy or Strategy.OBJECT, pedestrian, model_file)
    return Backbone.from_module(model, shape, detector=model.spec)


class ImageClass(nn.Module):
    """A detector that returns the class of each image together with its detections; all images have one size."""

    def __init__(self, detector: Any, shape: Sequence[int], strategy: Strategy, pedestrian: int,
                 model_file: str) -> None:
        """Take the parts of a detector.

        Raises:
            GraphError: the detector is not one of torchvision with a feature pyramid and only boxes or masks.
        """
        super().__init__()
        detector.eval()
        _require_no_code_of_its_own(detector)
        if not hasattr(detector.backbone, "fpn") or detector.roi_heads.has_keypoint():
            raise GraphError(f"{type(detector).__name__} has no feature pyramid, or finds keypoints: expected a Faster "
                             "R-CNN or a Mask R-CNN of torchvision with an FPN")
        tail = Tail(detector, shape, strategy, pedestrian)
        if not 0 < pedestrian < tail.n_labels:
            raise GraphError(f"the detector has the labels 1 to {tail.n_labels - 1}, found {pedestrian} for "
                             "pedestrians")
        self.body, self._read = detector.backbone.body, set(detector.backbone.body.return_layers)
        transform = detector.transform
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1)
                                 for values in (transform.image_mean, transform.image_std))
        self._resized, self._padded = tail.resized, tail.padded
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            maps = self._maps(torch.rand(1, 3, *tail.padded, generator=torch.Generator().manual_seed(0)))
            before = counter.get_total_flops()
            scores, detections = tail(*maps)
            tail.flops = counter.get_total_flops() - before
        self._sizes = (scores.shape[1], detections.shape[1], detections.shape[2])
        self.spec = DetectorSpec(model_file, strategy, pedestrian, register(tail))

    def forward(self, images: Tensor, targets: None = None) -> tuple[Tensor, Tensor]:
        """Return (B, K) probabilities and (B, N, 6 + M) detections for (B, 3, H, W) images in [0, 1].

        The parameters are those of the detector, because handlers call it with them.
        """
        x = (images - self._mean) / self._std
        if self._resized != tuple(images.shape[2:]):
            x = functional.interpolate(x, size=self._resized, mode="bilinear", align_corners=False)
        (height, width), (below, right) = self._resized, self._padded
        x = functional.pad(x, (0, right - width, 0, below - height))
        scores, detections = detect(self._maps(x), self.spec.tail, *self._sizes)
        return scores, detections

    def _maps(self, x: Tensor) -> list[Tensor]:
        """Return the output of the body; its stages are called here, so that each is a component of its own."""
        maps = []
        for name, stage in self.body.items():
            x = stage(x)
            if name in self._read:
                maps.append(x)
        return maps


def _require_no_code_of_its_own(detector: Any) -> None:
    """Check that what `ImageClass` does instead of a detector is what the detector does.

    Raises:
        GraphError: the detector, its transform or its backbone has methods of its own, or hooks.
    """
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    backbone = detector.backbone
    parts: list[tuple[str, Any, type, Sequence[str]]] = [
        ("detector", detector, GeneralizedRCNN, ["forward", "eager_outputs"]),
        ("transform", detector.transform, GeneralizedRCNNTransform,
         ["forward", "normalize", "resize", "batch_images", "postprocess"])]
    if hasattr(backbone, "fpn"):
        parts += [("backbone", backbone, BackboneWithFPN, ["forward"]),
                  ("backbone's body", backbone.body, IntermediateLayerGetter, ["forward"])]
    for what, part, kind, names in parts:
        own = [name for name in names
               if getattr(getattr(part, name, None), "__func__", None) is not getattr(kind, name)]
        if part._forward_hooks or part._forward_pre_hooks:
            own.append("hooks")
        if own:
            raise GraphError(f"the {what} {type(part).__name__} has its own {' and '.join(own)}, which would be "
                             f"skipped: expected those of {kind.__module__}.{kind.__name__}. Put what they do into the "
                             "handler, or into a layer of the body")
