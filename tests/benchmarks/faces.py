"""Recognizing people on photos: MobileFaceNet's pretrained embedding, and a classifier of the 40 people of ORL faces.

The classifier is trained on three photos of each person. Traffic shows the other seven photos as a camera would:
shifted, turned, lit and blurred at random, some 20 times each. The photos are dealt out first: each part of the records
has photos of its own, and the measured requests show yet other photos of the same people. A certificate still counts
each variant as an independent request, so it promises more than the 56 photos behind it can prove.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from early_exit.training.data.split import Part
from tests.support.cifar import data_folder, load_weights
from tests.support.models.face_handler import FaceClassifier
from tests.support.models.mobilefacenet import MobileFaceNet
from tests.support.sources import deal, recorded_parts

N_TRAINED = 3
"""The number of photos of each person that the classifier is trained on; traffic shows the other photos."""
N_RECORDED, N_MEASURED = 3200, 2400
_VARIANTS = 20
_CAMERA = v2.Compose([v2.RandomAffine(12, translate=(0.08, 0.08), scale=(0.85, 1.15), fill=90),
                      v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=0.4, contrast=0.4),
                      v2.GaussianBlur(5, sigma=(0.1, 1.5))])


def trained() -> MobileFaceNet:
    """Return the network with a classifier trained on the first photos of each person."""
    torch.manual_seed(0)
    model = MobileFaceNet()
    missing, unknown = model.load_state_dict(load_weights("mobilefacenet-casia"), strict=False)
    if unknown or {name.split(".")[0] for name in missing} != {"identities"}:
        raise RuntimeError(f"the weights do not fit: missing {missing}, unknown {unknown}")
    model.eval()
    seen = _seen_by_camera(*_photos(range(N_TRAINED)), seed=0, n=40 * N_TRAINED * _VARIANTS)
    with torch.no_grad():
        directions = torch.cat([model.embed(_model_input(seen.bodies[start:start + 64]))
                                for start in range(0, len(seen.bodies), 64)])
    target = torch.tensor(seen.people)
    optimizer = torch.optim.AdamW(model.identities.parameters(), lr=0.05)
    for _ in range(300):
        loss = functional.cross_entropy(model.identities(directions), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


@dataclass(frozen=True)
class Seen:
    """N variants of photos, as a camera would see them."""

    bodies: list[bytes]
    """PNG files."""
    people: list[int]


def traffic() -> tuple[Seen, list[Part], Seen]:
    """Return the recorded variants, the part of the records that each belongs to, and the measured variants."""
    dealt = deal(list(zip(*_photos(range(N_TRAINED, 10)))))
    parts = recorded_parts(N_RECORDED)
    recorded = [_seen_by_camera(*zip(*dealt[part]), seed=1 + part.number, n=parts.count(part)) for part in Part]
    return (Seen([body for seen in recorded for body in seen.bodies],
                 [person for seen in recorded for person in seen.people]), parts,
            _seen_by_camera(*zip(*dealt[None]), seed=10, n=N_MEASURED))


def _photos(numbers: Sequence[int]) -> tuple[list[Image.Image], list[int]]:
    """Return some photos of every person, and the person on each photo."""
    found = []
    for path in sorted((data_folder() / "orl-faces").glob("*.png")):
        person, number = map(int, re.fullmatch(r"s(\d+)_(\d+)", path.stem).groups())  # type: ignore[union-attr]
        if number - 1 in numbers:
            found.append((Image.open(path).convert("RGB"), person - 1))
    return [photo for photo, _ in found], [person for _, person in found]


def _seen_by_camera(photos: Sequence[Image.Image], people: Sequence[int], seed: int, n: int) -> Seen:
    """Return n variants in random order, equally many of each photo."""
    bodies = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = [number % len(photos) for number in torch.randperm(n).tolist()]
        for number in order:
            buffer = io.BytesIO()
            _CAMERA(photos[number]).save(buffer, "PNG")
            bodies.append(buffer.getvalue())
    return Seen(bodies, [people[number] for number in order])


def _model_input(bodies: Sequence[bytes]) -> Tensor:
    return torch.stack([FaceClassifier.image_processing(Image.open(io.BytesIO(body))) for body in bodies])
