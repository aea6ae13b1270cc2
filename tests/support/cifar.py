"""The 10,000 test images each of CIFAR-10 and CIFAR-100, and weights of networks for them, from the data folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataMissing(Exception):
    """The data folder or a file in it is missing; the message says where it was expected."""


def data_folder() -> Path:
    """Return the folder of real data: $EARLY_EXIT_DATA, else ../shared/data.

    Raises:
        DataMissing: neither folder exists.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("EARLY_EXIT_DATA", beside))
    if not (folder / "cifar10-test" / "images.tar").is_file():
        raise DataMissing(f"no cifar10-test/images.tar in {folder}: set EARLY_EXIT_DATA to the data folder")
    return folder


def load_requests(data: str = "cifar10-test") -> tuple[list[bytes], list[int]]:
    """Return the bytes and the labels of all images in their shuffled order. Images are PNGs for `cifar100-test` and
    JPEGs otherwise.

    Raises:
        DataMissing: the images are missing.
    """
    folder = data_folder() / data
    if not (folder / "images.tar").is_file():
        raise DataMissing(f"no images.tar in {folder}")
    labels = json.loads((folder / "labels.json").read_text())["labels"]
    suffix = "png" if data == "cifar100-test" else "jpg"
    with tarfile.open(folder / "images.tar") as tar:
        names = [f"{number:05d}.{suffix}" for number in range(len(labels))]
        bodies = [tar.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    return bodies, labels


def load_weights(name: str) -> dict[str, Tensor]:
    """Return the state dict `weights/<name>.safetensors`, in float32 whatever its stored dtype.

    Raises:
        DataMissing: the file is missing.
    """
    file = data_folder() / "weights" / f"{name}.safetensors"
    if not file.is_file():
        raise DataMissing(f"no {file}")
    weights: dict[str, Tensor] = load_file(file)
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}


def as_batch(bodies: Sequence[bytes], mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Return the (B, 3, 32, 32) float32 inputs that the handler makes from the requests."""
    images = np.stack([np.asarray(Image.open(io.BytesIO(body)).convert("RGB")) for body in bodies])
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).contiguous()
