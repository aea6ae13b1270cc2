"""Frames of scenes: near-equal versions of real images, and what a backbone says of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.model.loading import build_model
from tests.support import digits
from tests.support.cifar import as_batch, load_requests, load_weights
from tests.support.models.cifar100_handler import Cifar100Classifier
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import factory_request, original_mar

_CONFIG = "minWorkers: 1\nmaxWorkers: 1\n"
_N_LAYERS = 5
_BATCH = 250


@dataclass(frozen=True)
class Bank:
    """F frames of each of S sources; frame f of source s is row s * F + f."""

    n_training: int
    """Heads are trained on frames of so many sources, the first ones; all else is drawn from the others."""
    n_frames: int
    """F."""
    label: Tensor
    """(S,) int64."""
    states: Tensor
    """(S * F, K) float16: the backbone's log-probabilities, as they are recorded."""
    layers: tuple[CandidateLayer, ...]
    """The candidates that there are activations of."""
    activations: Mapping[str, Tensor]
    """(S * F, ...) float16 by layer path, pooled as they are recorded."""
    flops: float
    """Of the backbone."""

    @property
    def n_sources(self) -> int:
        return len(self.label)

    @property
    def difficulty(self) -> Tensor:
        """(S,) how unsure the backbone is of each source."""
        return 1 - self.states.float().exp().amax(dim=1).view(-1, self.n_frames).mean(dim=1)


def cifar(folder: Path) -> Bank:
    """Return frames of CIFAR-10's test images, as a ResNet-18 sees them."""
    mar = original_mar(folder / "original", "cifar", "cifar_resnet18w32.py", "cifar_handler.py",
                       load_weights("resnet18w32-cifar10-jpeg"), _CONFIG)
    backbone = _backbone(ArchiveRequest(str(mar), folder / "store", input_shape=(3, 32, 32)), folder)
    bodies, labels = load_requests()
    chosen = slice(0, 6500)
    images = [_pixels(body, "RGB") for body in bodies[chosen]]
    return _bank(backbone, images, labels[chosen], n_training=2500, n_frames=4, quality=(70, 95), inputs=as_batch)


def cifar100(folder: Path) -> Bank:
    """Return CIFAR-100's test images, one frame of each, as a ResNet-50 sees them."""
    mar = original_mar(folder / "original", "cifar100", "cifar100_resnet50.py", "cifar100_handler.py",
                       load_weights("resnet50-cifar100"), _CONFIG)
    backbone = _backbone(ArchiveRequest(str(mar), folder / "store", input_shape=(3, 32, 32)), folder)
    bodies, labels = load_requests("cifar100-test")
    chosen = slice(0, 6500)
    normalize = Cifar100Classifier.image_processing.transforms[-1]
    return _bank(backbone, [_pixels(body, "RGB") for body in bodies[chosen]], labels[chosen], n_training=2500,
                 n_frames=1, quality=(70, 95), inputs=partial(as_batch, mean=normalize.mean, std=normalize.std))


def handwriting(folder: Path, model: DigitsResNet | None = None, *, n_training: int = 2000, n_others: int = 4000,
                n_frames: int = 8) -> Bank:
    """Return frames of scikit-learn's digits; those that heads are trained on are none of the others."""
    asked = factory_request(folder / "original", folder / "store", "digits", model or digits.train_backbone(),
                            "digits_handler.py", _CONFIG, input_shape=(1, 32, 32))
    middle = digits.N_FOR_BACKBONE + 400
    requests = [*digits.traffic(n_training, seed=1, digits=range(digits.N_FOR_BACKBONE, middle)),
                *digits.traffic(n_others, seed=2, digits=range(middle, digits.N_DIGITS))]
    return _bank(_backbone(asked, folder), [_pixels(one.body, "L") for one in requests],
                 [one.label for one in requests], n_training=n_training, n_frames=n_frames, quality=(80, 95),
                 inputs=_grey)


def _backbone(asked: ArchiveRequest, folder: Path) -> Backbone:
    archive = ArchiveLayout(folder / "archive")
    extract(build_archive(asked), archive.root)
    return load_backbone(archive.folder)


def _bank(backbone: Backbone, images: Sequence[np.ndarray], labels: Sequence[int], *, n_training: int, n_frames: int,
          quality: tuple[int, int], inputs: Callable[[Sequence[bytes]], Tensor]) -> Bank:
    """Let the backbone answer frames of images.

    Args:
        backbone: of images.
        images: (H, W, 3) or (H, W) uint8.
        labels: of the images.
        n_training: of them.
        n_frames: F.
        quality: the range of JPEG's.
        inputs: makes what the backbone gets of JPEG bytes.
    """
    random = np.random.default_rng(0)
    model = build_model(backbone, sampling_rate=1.0, record_layers=_N_LAYERS, record_pool=4)
    step = max(1, _BATCH // n_frames)
    states, found = [], []
    with torch.no_grad():
        for start in tqdm(range(0, len(images), step), desc="frames", disable=None):
            bodies = [_frame(image, quality, random) for image in images[start:start + step] for _ in range(n_frames)]
            model(inputs(bodies))
            for served in model.log.take():
                states.append(served.answers.reference.log_softmax(dim=1).half())
                found.append({path: rows.half() for path, rows in served.activations.items()})
    activations = {path: torch.cat([one[path] for one in found]) for path in found[0]}
    layers = tuple(layer for layer in backbone.description.candidates if layer.path in activations)
    return Bank(n_training, n_frames, torch.tensor(labels), torch.cat(states), layers, activations,
                backbone.description.flops)


def _frame(image: np.ndarray, quality: tuple[int, int], random: np.random.Generator) -> bytes:
    """Return JPEG bytes of an image that is shifted a little, a little brighter or darker, and a little noisy."""
    across, down = random.integers(-1, 2, size=2)
    padded = np.pad(image, [(1, 1), (1, 1), (0, 0)][:image.ndim], mode="edge").astype(np.float32)
    moved = padded[1 + down:1 + down + image.shape[0], 1 + across:1 + across + image.shape[1]]
    seen = moved * random.uniform(0.92, 1.08) + random.normal(scale=random.uniform(0, 4), size=moved.shape)
    buffer = io.BytesIO()
    picture = Image.fromarray(seen.round().clip(0, 255).astype(np.uint8))
    picture.save(buffer, "JPEG", quality=int(random.integers(*quality)))
    return buffer.getvalue()


def _grey(bodies: Sequence[bytes]) -> Tensor:
    """Return (B, 1, 32, 32): what the handler of digits makes of the requests."""
    pictures = np.stack([_pixels(body, "L") for body in bodies])
    return (torch.from_numpy(pictures).float().unsqueeze(1) / 255 - 0.3) / 0.35


def _pixels(body: bytes, mode: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)).convert(mode))
