"""scikit-learn's digits at 32x32 as a stream of requests, and a small backbone that was not trained on them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from early_exit.training.data.split import Part
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.sources import deal, recorded_parts

N_DIGITS, N_FOR_BACKBONE = 1797, 900
"""The number of digits in the data set, and of those that the backbone learns from. Traffic shows the other 897."""
_UNSEEN = range(N_FOR_BACKBONE, N_DIGITS)
_SHOWN = deal(_UNSEEN)


@dataclass(frozen=True)
class Request:
    """A digit as a client sends it."""

    body: bytes
    """The image as a PNG."""
    label: int


def traffic(count: int, seed: int, digits: Sequence[int] = _UNSEEN, *, once: bool = False) -> list[Request]:
    """Return requests that show digits, by default ones that the backbone never saw, after random shifts, rotations and
    noise. Digits are drawn independently, or each at most once."""
    images, labels = _digits(digits)
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.randperm(len(images), generator=generator)[:count] if once else
              torch.randint(len(images), (count,), generator=generator))
    pictures = (_augment(images[chosen], generator) * 255).round().byte().squeeze(1).numpy()
    return [Request(_png(picture), int(label)) for picture, label in zip(pictures, labels[chosen])]


def recorded_traffic(count: int, seed: int) -> tuple[list[Request], list[Part]]:
    """Return requests to record and, for each, its part of the records. No two parts show the same digit."""
    parts = recorded_parts(count)
    return _in_parts(parts, seed, _SHOWN, once=()), parts


def recorded_once(seed: int, n_for_backbone: int = N_FOR_BACKBONE) -> list[Request]:
    """Return requests to record. Those that choose exits or certify show each of their digits once.

    So each of these is evidence of its own. Earlier requests, from which heads learn, show variants of their digits.

    Args:
        seed: the seed of the variants.
        n_for_backbone: the number of digits that the backbone learned from.
    """
    shown = deal(range(n_for_backbone, N_DIGITS))
    count = int(min(len(shown[part]) / part.share for part in (Part.TUNE, Part.CERTIFY)))
    return _in_parts(recorded_parts(count), seed, shown, once=(Part.TUNE, Part.CERTIFY))


def _in_parts(parts: Sequence[Part], seed: int, shown: Mapping[Part | None, Sequence[int]], *, once: Sequence[Part]
              ) -> list[Request]:
    """Return a request for each item of `parts`. The parts in `once` show each digit at most once."""
    return [one for number, part in enumerate(Part)
            for one in traffic(parts.count(part), 1000 * seed + number, shown[part], once=part in once)]


def measured_traffic(count: int, seed: int, n_for_backbone: int = N_FOR_BACKBONE) -> list[Request]:
    """Return requests to measure with, whose digits neither the backbone learned from nor recorded requests show."""
    return traffic(count, seed, deal(range(n_for_backbone, N_DIGITS))[None])


def train_backbone(n_steps: int = 400, seed: int = 0, n_digits: int = N_FOR_BACKBONE, *,
                   kind: type[nn.Module] = DigitsResNet) -> nn.Module:
    """Train a backbone of the given kind on the first digits, with the augmentation of the requests."""
    images, labels = _digits(range(n_digits))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = kind().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=n_steps + 1)
    for _ in range(n_steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        inputs = ((_augment(images[batch], generator) - 0.3) / 0.35).to(memory_format=torch.channels_last)
        loss = functional.cross_entropy(model(inputs), labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _digits(which: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (N, 1, 24, 24) float images in [0, 1] and (N,) labels of digits, numbered in one fixed random order."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(N_DIGITS)[list(which)]
    small = torch.from_numpy(data.images[order]).float().unsqueeze(1) / 16
    return functional.interpolate(small, size=24, mode="bilinear"), torch.from_numpy(data.target[order])


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return (N, 1, 32, 32) variants in [0, 1] of (N, 1, 24, 24) images, some of them hard to read."""
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    angle, zoom = uniform(-0.4, 0.4), uniform(0.8, 1.4)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    matrix = torch.stack([torch.stack([cos, -sin, uniform(-0.25, 0.25)], 1),
                          torch.stack([sin, cos, uniform(-0.25, 0.25)], 1)], 1)  # (N, 2, 3)
    grid = functional.affine_grid(matrix, [len(images), 1, 32, 32], align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    noise = torch.randn(moved.shape, generator=generator) * uniform(0.0, 0.3, 1, 1, 1) ** 1.5
    return (moved * uniform(0.5, 1.0, 1, 1, 1) + noise).clamp(0, 1)


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def batches(requests: list[Request], size: int) -> Iterator[Tensor]:
    """Yield the requests as the (size, 1, 32, 32) batches that the handler gives to the model."""
    for start in range(0, len(requests) - size + 1, size):
        pictures = [np.asarray(Image.open(io.BytesIO(request.body))) for request in requests[start:start + size]]
        yield (torch.from_numpy(np.stack(pictures)).float().unsqueeze(1) / 255 - 0.3) / 0.35
