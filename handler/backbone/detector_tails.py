"""The tails of detectors that graphs in this process call, by identity.

A detector's graph ends in one operation that calls the detector's tail: the layers after its stages. The tails have a
module apart from that operation, because torch registers an operation only once in a process, at the first import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from early_exit.handler.archive_layout import TAIL_FILE
from early_exit.handler.backbone.image_class import DetectorSpec

TAILS: dict[str, Any] = {}


def tail_parameters(spec: DetectorSpec | None) -> list[nn.Parameter]:
    """Return the parameters of a detector's tail, or an empty list if there is no detector."""
    return [] if spec is None else list(TAILS[spec.tail].parameters())


def save_tail(spec: DetectorSpec, folder: Path) -> None:
    """Write the weights of a tail into the folder of its backbone."""
    tensors = {name: tensor.contiguous() for name, tensor in TAILS[spec.tail].state_dict().items()}
    save_file(tensors, folder / TAIL_FILE)
