"""Who is on a photo: MobileFaceNet's pretrained embedding and a classifier of the 40 people of the ORL faces.

The classifier is trained on three photos of each person. Traffic shows the other seven as a camera would, shifted,
turned, lit and blurred at random, 20 times: four of them in what is recorded, three in what is measured. So what is
measured are other photos of known people. All variants of a recorded photo are in the same part of the records; a
certificate still counts each as a request of its own, and so promises more than the 43 photos there can.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from tests.support.cifar import data_folder, load_weights
from tests.support.models.face_handler import FaceClassifier
from tests.support.models.mobilefacenet import MobileFaceNet
from tests.support.sources import parts_of

N_TRAINED, N_RECORDED = 3, 4
"""Photos of each person."""
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
    seen = _seen_by_camera(*_photos(range(N_TRAINED)), seed=0)
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
    """N variants of photos, as the camera sees them."""

    bodies: list[bytes]
    """PNG."""
    people: list[int]
    photos: list[int]
    """Which photo each is a variant of."""

    def request_ids(self) -> list[str]:
        """Return an id for each, such that all variants of a photo fall into the same part of the records."""
        ids: dict[int, Iterator[str]] = {}
        for photo in set(self.photos):
            names = [f"photo-{photo}-{number}" for number in range(40 * _VARIANTS)]
            parts = parts_of(names)
            # Whatever part the first is in, so many others are there too: the smallest part has a fifth of all.
            ids[photo] = iter([name for name, part in zip(names, parts) if part == parts[0]])
        return [next(ids[photo]) for photo in self.photos]


def traffic() -> tuple[Seen, Seen]:
    """Return what is recorded and what is measured."""
    return (_seen_by_camera(*_photos(range(N_TRAINED, N_TRAINED + N_RECORDED)), seed=1),
            _seen_by_camera(*_photos(range(N_TRAINED + N_RECORDED, 10)), seed=2))


def _photos(numbers: Sequence[int]) -> tuple[list[Image.Image], list[int]]:
    """Return some photos of every person, and the person of each."""
    found = []
    for path in sorted((data_folder() / "orl-faces").glob("*.png")):
        person, number = map(int, re.fullmatch(r"s(\d+)_(\d+)", path.stem).groups())  # type: ignore[union-attr]
        if number - 1 in numbers:
            found.append((Image.open(path).convert("RGB"), person - 1))
    return [photo for photo, _ in found], [person for _, person in found]


def _seen_by_camera(photos: Sequence[Image.Image], people: Sequence[int], seed: int) -> Seen:
    bodies = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = [number % len(photos) for number in torch.randperm(len(photos) * _VARIANTS).tolist()]
        for number in order:
            buffer = io.BytesIO()
            _CAMERA(photos[number]).save(buffer, "PNG")
            bodies.append(buffer.getvalue())
    return Seen(bodies, [people[number] for number in order], order)


def _model_input(bodies: Sequence[bytes]) -> Tensor:
    return torch.stack([FaceClassifier.image_processing(Image.open(io.BytesIO(body))) for body in bodies])
