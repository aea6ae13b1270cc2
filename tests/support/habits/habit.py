"""A habit of those who write handlers, and what shows whether a client notices that its archive was repackaged."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.errors import Unsupported
from early_exit.handler.python_modules import own_classes

FILES = Path(__file__).with_name("files")
"""Handlers and model files as users write them; they import each other by their bare names, as in an archive."""
CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 4\nmaxBatchDelay: 40\nresponseTimeout: 300\n"


class Over(Enum):
    """How a request reaches the server."""

    REST = "predictions"
    GRPC = "gRPC"
    WORKFLOW = "workflow"


@dataclass(frozen=True)
class Ask:
    """A request of a client."""

    body: bytes = b""
    content_type: str = ""
    explain: bool = False
    """Whether it asks for an explanation, which handlers give for whole batches: it is sent alone only."""
    fails: bool = False
    """Whether stock TorchServe fails it, or the batch that it is in: it is sent alone only."""
    parts: tuple[tuple[str, bytes, str], ...] = ()
    """Name, value and content type of the parts of a form, in place of a body."""
    over: Over = Over.REST
    exact: bool = False
    """Whether an error has to be the same too, where otherwise ours says what is wrong."""


@dataclass(frozen=True)
class UsersFiles:
    """What is given to torch-model-archiver beside handler, model file and configuration."""

    serialized: Path | None = None
    extra: tuple[Path, ...] = ()


def state_dict(model: nn.Module, folder: Path) -> UsersFiles:
    """Write the weights as most people do."""
    torch.save(model.state_dict(), folder / "weights.pth")
    return UsersFiles(folder / "weights.pth")


@dataclass(frozen=True)
class Habit:
    """A handler with its model, and requests for it."""

    name: str
    """Of the habit and of its model in TorchServe."""
    handler: str
    """A file in `FILES`, with the name of a function behind a colon where one is named, or a built-in handler."""
    model: Callable[[], nn.Module]
    """Makes what answers, always with the same weights."""
    asks: tuple[Ask, ...]
    """The first two are the samples that `ee-archive` is given."""
    model_file: str | None = None
    """A file in `FILES`."""
    imports: tuple[str, ...] = ()
    """Files in `FILES` that handler and model file import."""
    write: Callable[[nn.Module, Path], UsersFiles] = state_dict
    """Writes the user's other files into a folder."""
    followers: Callable[[Any], Sequence[Sequence[nn.Linear]]] | None = None
    """Returns, of the model, the linear layers that follow each place of an exit, with ReLU between them. Where what
    follows is more than a head can be, there are no exits."""
    thresholds: tuple[float, ...] = (0.9, 0.6)
    """Least confidence that leaves, for each exit."""
    refusal: Unsupported | None = None
    """The reason for which it is refused; without one its answers stay the same."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the `ArchiveRequest`, what a user must say."""
    version: str = "1.0"
    config: str = CONFIG
    archive_format: str = "default"
    """Of torch-model-archiver."""
    envelope: str | None = None
    """TorchServe's around the handler."""


def instance(model_file: str, seed: int = 0) -> nn.Module:
    """Return an untrained instance of the class in a model file."""
    if str(FILES) not in sys.path:
        sys.path.append(str(FILES))
    [kind] = own_classes(importlib.import_module(model_file.removesuffix(".py")))
    torch.manual_seed(seed)
    model: nn.Module = kind().eval()
    return model


@torch.no_grad()
def made(model_file: str, example: Tensor) -> nn.Module:
    """Return an instance of the class in a model file whose scores for an example differ clearly."""
    model = instance(model_file)
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    classifier = getattr(model, "last", layers[-1])
    for layer in layers:
        layer.bias *= 0.1  # so that small inputs give unsure answers
    scores = model(example)
    scores = next(iter(scores.values())) if isinstance(scores, dict) else scores
    spread = scores[scores > -1e8].std()
    classifier.weight *= 3 / spread
    classifier.bias *= 3 / spread
    return model
