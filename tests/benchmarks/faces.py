"""Who is on a photo: MobileFaceNet's pretrained embedding and a classifier of the 40 people of the ORL faces.

The classifier is trained on three photos of each person. Traffic shows the other seven as a camera would, shifted,
turned, lit and blurred at random: four of them in what is recorded, three in what is measured.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from tests.support.cifar import data_folder, load_weights
from tests.support.models.face_handler import FaceClassifier
from tests.support.models.mobilefacenet import MobileFaceNet

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
    photos, people = _photos(range(N_TRAINED))
    bodies, labels = _seen_by_camera(photos, people, seed=0)
    with torch.no_grad():
        directions = torch.cat([model.embed(_model_input(bodies[start:start + 64]))
                                for start in range(0, len(bodies), 64)])
    target = torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.identities.parameters(), lr=0.05)
    for _ in range(300):
        loss = functional.cross_entropy(model.identities(directions), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def traffic() -> tuple[list[bytes], list[int], int]:
    """Return PNG bodies, their people, and how many of them are to be recorded: the first."""
    recorded = _seen_by_camera(*_photos(range(N_TRAINED, N_TRAINED + N_RECORDED)), seed=1)
    measured = _seen_by_camera(*_photos(range(N_TRAINED + N_RECORDED, 10)), seed=2)
    return recorded[0] + measured[0], recorded[1] + measured[1], len(recorded[0])


def _photos(numbers: Sequence[int]) -> tuple[list[Image.Image], list[int]]:
    """Return some photos of every person, and the person of each."""
    found = []
    for path in sorted((data_folder() / "orl-faces").glob("*.png")):
        person, number = map(int, re.fullmatch(r"s(\d+)_(\d+)", path.stem).groups())  # type: ignore[union-attr]
        if number - 1 in numbers:
            found.append((Image.open(path).convert("RGB"), person - 1))
    return [photo for photo, _ in found], [person for _, person in found]


def _seen_by_camera(photos: Sequence[Image.Image], people: Sequence[int], seed: int) -> tuple[list[bytes], list[int]]:
    bodies, labels = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in torch.randperm(len(photos) * _VARIANTS).tolist():
            buffer = io.BytesIO()
            _CAMERA(photos[number % len(photos)]).save(buffer, "PNG")
            bodies.append(buffer.getvalue())
            labels.append(people[number % len(photos)])
    return bodies, labels


def _model_input(bodies: Sequence[bytes]) -> Tensor:
    return torch.stack([FaceClassifier.image_processing(Image.open(io.BytesIO(body))) for body in bodies])
