"""Object detectors as classifiers of whole images, which predict the main object, or whether there is a pedestrian.

Exits are placed after the stages of a detector's backbone. The layers after these stages, the tail, depend on the data
and cannot be exported. In the graph they are one operation, `early_exit::detect`, which returns for each image the
scores of the classes, by the strategy, and beside them the detections. An image that leaves early has no detections.
The strategies are those of the paper's section 3.5.1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from early_exit.handler.archive_layout import TAIL_FILE
from early_exit.handler.backbone.detector_tails import TAILS
from early_exit.handler.backbone.image_class import DetectorSpec, Strategy, class_scores
from early_exit.handler.detection.detections import detections
from early_exit.handler.errors import ArchiveError
from early_exit.handler.python_modules import own_classes


def sizes_in(transform: Any, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (height, width) of an image as the detector scales it, and the same with the detector's padding."""
    least, most = min(shape[1:]), max(shape[1:])
    scale = min(transform.min_size[-1] / least, transform.max_size / most)
    # torchvision's setting is (width, height).
    width, height = transform.fixed_size or [int(size * scale) for size in reversed(shape[1:])]
    step = transform.size_divisible
    return (height, width), (-(-height // step) * step, -(-width // step) * step)


class Tail(nn.Module):
    """The part of a detector after its backbone's maps: pyramid, proposals and heads."""

    def __init__(self, detector: Any, shape: Sequence[int], strategy: Strategy, pedestrian: int) -> None:
        """Take the parts of a torchvision detector.

        Args:
            detector: a `GeneralizedRCNN` whose backbone has a feature pyramid.
            shape: (C, H, W) of its images.
            strategy: the definition of the class of an image.
            pedestrian: the label of pedestrians.
        """
        super().__init__()
        self.fpn, self.rpn, self.roi_heads = detector.backbone.fpn, detector.rpn, detector.roi_heads
        self.names = tuple(detector.backbone.body.return_layers.values())
        self.strategy, self.pedestrian = strategy, pedestrian
        self.size = (shape[1], shape[2])
        self.resized, self.padded = sizes_in(detector.transform, shape)
        self.n_labels: int = detector.roi_heads.box_predictor.cls_score.out_features
        self.n_found: int = detector.roi_heads.detections_per_img
        self.flops = 0
        """FLOPs of the tail for one image, counted when the detector is exported."""

    @torch.no_grad()
    def forward(self, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, K) probabilities and (B, N, 6 + M) detections.

        A detection is a box in pixels of the image, a label, a score, and the M numbers of a mask within the box. Rows
        without a detection are NaN.
        """
        from torchvision.models.detection.image_list import ImageList

        n_images = len(maps[0])
        features = self.fpn(OrderedDict(zip(self.names, maps)))
        images = ImageList(maps[0].new_empty(1).expand(n_images, 3, *self.padded), [self.resized] * n_images)
        proposals, _ = self.rpn(images, features)
        detections, _ = self.roi_heads(features, proposals, images.image_sizes)
        scores = [class_scores(image["labels"], image["scores"], self.n_labels, self.strategy, self.pedestrian)
                  for image in detections]
        stretch = maps[0].new_tensor([there / here for here, there in zip(self.resized, self.size)]).flip(0).repeat(2)
        rows = [self._row(image, stretch) for image in detections]
        return torch.stack(scores), torch.stack(rows)

    def _row(self, detected: dict[str, Tensor], stretch: Tensor) -> Tensor:
        columns = [detected["boxes"] * stretch, detected["labels"][:, None].float(), detected["scores"][:, None]]
        if "masks" in detected:
            columns.append(detected["masks"].flatten(1))
        row = torch.cat(columns, dim=1)
        return functional.pad(row, (0, 0, 0, self.n_found - len(row)), value=torch.nan)

    def identity(self) -> str:
        """Return a hash of everything that determines the detections."""
        settings = [(name, key, value) for part in (self.fpn, self.rpn, self.roi_heads)
                    for name, module in part.named_modules() for key, value in sorted(vars(module).items())
                    if _is_setting(value)]
        what = (self.strategy.value, self.pedestrian, self.size, self.resized, self, settings)
        digest = hashlib.sha256(repr(what).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _is_setting(value: object) -> bool:
    """Tell whether an attribute is a number or a dict of numbers, such as one for training and one for inference."""
    return isinstance(value, (int, float)) or (
        isinstance(value, dict) and bool(value) and all(isinstance(number, (int, float)) for number in value.values()))


def register(tail: Tail) -> str:
    """Register a tail for the graphs that call it, and return its identity."""
    identity = tail.eval().identity()
    TAILS.setdefault(identity, tail)
    return identity


def images_of(spec: DetectorSpec, probabilities: Tensor, stages: Sequence[int],
              detected: Tensor | None) -> list[dict[str, Tensor]]:
    """Return for each image of a batch the result of the user's detector, which has at most one object for an image
    that left early.

    Args:
        spec: the detector.
        probabilities: (B, K) probabilities of the images' classes.
        stages: for each image, the stage at which it left, or `FULL` if it did not leave.
        detected: (W, N, 6 + M) detections of the images that did not leave, in order, or None if all left.
    """
    tail = TAILS[spec.tail]
    confidence, classes = probabilities.max(dim=1)
    detected = probabilities[:0] if detected is None else detected
    return detections(stages, spec.labels(classes), confidence, detected, tail.size,
                      has_mask=tail.roi_heads.has_mask())


def load_tail(spec: DetectorSpec, folder: Path, shape: Sequence[int]) -> None:
    """Read a tail from the folder of its backbone and register it.

    Args:
        spec: the detector.
        folder: the folder of the weights; the user's files are in its parent.
        shape: (C, H, W) of the images.

    Raises:
        ArchiveError: the model file or the weights are not those of the archive.
    """
    if spec.tail in TAILS:
        return
    file = folder.parent / spec.model_file
    sys.path.insert(0, str(file.parent))  # it may import the user's other files
    try:
        module_spec = importlib.util.spec_from_file_location(file.stem, file)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        [kind] = own_classes(module)
        tail = Tail(kind(), shape, spec.strategy, spec.pedestrian)
        tail.load_state_dict(load_file(folder / TAIL_FILE))
    except Exception as error:  # the user's own code may raise anything
        raise ArchiveError(f"cannot create the detector of {spec.model_file}: {type(error).__name__}: {error}"
                           ) from error
    finally:
        sys.path.remove(str(file.parent))
    if register(tail) != spec.tail:
        raise ArchiveError(f"{TAIL_FILE} or {spec.model_file} is not the file that the archive was made with: make the "
                           "archive again")


@torch.library.custom_op("early_exit::detect", mutates_args=())
def detect(maps: list[Tensor], tail: str, n_classes: int, n_found: int, n_numbers: int) -> tuple[Tensor, Tensor]:
    """Return (B, n_classes) probabilities and (B, n_found, n_numbers) detections for the backbone's (B, ...) maps.

    Args:
        maps: the maps of the backbone's stages, in the detector's order.
        tail: identity of a registered tail.
        n_classes: the number of classes of images.
        n_found: the largest number of detections in an image.
        n_numbers: the number of values of a detection.
    """
    if not len(maps[0]):
        return maps[0].new_zeros(0, n_classes), maps[0].new_zeros(0, n_found, n_numbers)
    scores, detected = TAILS[tail].to(maps[0].device)(*maps)
    return scores, detected


@detect.register_fake
def _(maps: list[Tensor], tail: str, n_classes: int, n_found: int, n_numbers: int) -> tuple[Tensor, Tensor]:
    n_images = maps[0].shape[0]
    return maps[0].new_empty(n_images, n_classes), maps[0].new_empty(n_images, n_found, n_numbers)


@register_flop_formula(torch.ops.early_exit.detect)
def _flops(maps: list[Sequence[int]], tail: str, *args: object, **kwargs: object) -> int:
    of_an_image: int = TAILS[tail].flops
    return of_an_image * maps[0][0]
