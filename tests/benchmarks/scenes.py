"""A Mask R-CNN that detects objects in scenes. It is trained here, since no pretrained one is available.

A scene is a blurred photo with one cut-out pasted in: a face (a person), or an automobile, a cat or a ship of CIFAR-10.
One in ten scenes has no cut-out. The detector is trained on other people, pictures and photos than those of the
traffic. Each part of the records shows its own ones, and the measured requests show yet others.
"""

from __future__ import annotations

import io
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from early_exit.training.data.split import Part
from tests.support.cifar import data_folder, load_requests
from tests.support.models.scene_detector import SceneDetector
from tests.support.sources import deal, recorded_parts

SIDE = 128
N_RECORDED, N_MEASURED = 3200, 800
PERSON = 1
_CIFAR_LABELS = {1: 2, 3: 3, 8: 4}
"""CIFAR-10's labels of automobile, cat and ship, and the detector's labels of them, which follow that of a person."""
_N_STEPS, _BATCH = 300, 8


@dataclass(frozen=True)
class Cutouts:
    """The photos and cut-outs that scenes are made of."""

    photos: list[Image.Image]
    by_label: dict[int, list[list[Image.Image]]]
    """The cut-outs of each label. Pictures of the same person form one list; each other picture has its own list."""

    def dealt(self) -> dict[Part | None, Cutouts]:
        """Return what each part of the records shows, and under None what the measured requests show."""
        photos, by_label = deal(self.photos), {label: deal(pictures) for label, pictures in self.by_label.items()}
        return {part: Cutouts(photos[part], {label: dealt[part] for label, dealt in by_label.items()})
                for part in photos}

    def scene(self, draw: random.Random) -> tuple[Image.Image, int, Image.Image | None]:
        """Return a scene, its label (0 for nothing), and the mask of its object."""
        photo = draw.choice(self.photos)
        left, top = (draw.randrange(size - SIDE + 1) for size in photo.size)
        scene = photo.crop((left, top, left + SIDE, top + SIDE)).filter(ImageFilter.GaussianBlur(draw.uniform(1, 3)))
        if draw.random() < 0.1:
            return scene, 0, None
        label = draw.choice(sorted(self.by_label))
        side = draw.randrange(36, 88)
        cutout = draw.choice(draw.choice(self.by_label[label])).resize((side, side))
        left, top = (draw.randrange(SIDE - side) for _ in range(2))
        mask = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).ellipse((left, top, left + side - 1, top + side - 1), fill=255)
        layer = scene.copy()
        layer.paste(cutout, (left, top))
        return Image.composite(layer, scene, mask), label, mask


def traffic() -> tuple[list[bytes], list[int], list[Part]]:
    """Return JPEG bodies, their labels, and the part of the records of each. The bodies that have no part, at the end,
    are measured."""
    cutouts, draw = _cutouts(for_training=False).dealt(), random.Random(1)
    bodies, labels, parts = [], [], recorded_parts(N_RECORDED)
    for part in (*parts, *[None] * N_MEASURED):
        scene, label, _ = cutouts[part].scene(draw)
        buffer = io.BytesIO()
        scene.save(buffer, "JPEG", quality=90)
        bodies.append(buffer.getvalue())
        labels.append(label)
    return bodies, labels, parts


def trained() -> SceneDetector:
    """Return the detector, trained on scenes of its own."""
    torch.manual_seed(0)
    model = SceneDetector().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=_N_STEPS + 1)
    batches = _batches()
    for step in range(_N_STEPS):
        images, targets = next(batches)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} the detector's step {step} of {_N_STEPS}: loss {loss.item():.2f}",
                  file=sys.stderr, flush=True)
    return model.eval()


def _batches() -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    cutouts, draw = _cutouts(for_training=True), random.Random(0)
    while True:
        scenes = [cutouts.scene(draw) for _ in range(_BATCH)]
        yield ([pil_to_tensor(scene) / 255 for scene, _, _ in scenes],
               [_target(label, mask) for _, label, mask in scenes])


def _target(label: int, mask: Image.Image | None) -> dict[str, Tensor]:
    if mask is None:
        return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
                "masks": torch.zeros(0, SIDE, SIDE, dtype=torch.uint8)}
    return {"boxes": torch.tensor([mask.getbbox()], dtype=torch.float32), "labels": torch.tensor([label]),
            "masks": (pil_to_tensor(mask) > 127).byte()}


def _cutouts(*, for_training: bool) -> Cutouts:
    half = slice(None, None, 2) if for_training else slice(1, None, 2)
    folder = data_folder() / "imagenet1k-sample"
    files = [one["file"] for one in json.loads((folder / "index.json").read_text())][half]
    photos = [_at_least(Image.open(folder / file).convert("RGB")) for file in files]
    people = [[Image.open(path).convert("RGB").crop((0, 10, 92, 102))
               for path in sorted((data_folder() / "orl-faces").glob(f"s{person}_*.png"))]
              for person in (range(1, 21) if for_training else range(21, 41))]
    by_label = {PERSON: people}
    bodies, labels = load_requests()
    for body, label in list(zip(bodies, labels))[half]:
        if label in _CIFAR_LABELS:
            by_label.setdefault(_CIFAR_LABELS[label], []).append([Image.open(io.BytesIO(body)).convert("RGB")])
    return Cutouts(photos, by_label)


def _at_least(photo: Image.Image) -> Image.Image:
    """Return a photo scaled to 160 pixels on its shorter side."""
    scale = 160 / min(photo.size)
    return photo.resize((max(SIDE, round(photo.width * scale)), max(SIDE, round(photo.height * scale))))
