"""A habit of people who write handlers, and requests that show whether a client would notice the repackaging."""

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
"""The folder of handlers and model files as users write them. They import each other by bare names, as in archives."""
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
    """Whether the request asks for an explanation. It is then only sent alone, as handlers explain whole batches."""
    fails: bool = False
    """Whether stock TorchServe fails this request or the batch that contains it. It is then only sent alone."""
    parts: tuple[tuple[str, bytes, str], ...] = ()
    """The name, value and content type of each part of a form, which replaces the body."""
    over: Over = Over.REST
    exact: bool = False
    """Whether the text of an error must be the same, although otherwise ours may say what is wrong."""


@dataclass(frozen=True)
class UsersFiles:
    """The files that torch-model-archiver gets besides the handler, the model file and the configuration."""

    serialized: Path | None = None
    extra: tuple[Path, ...] = ()


def state_dict(model: nn.Module, folder: Path) -> UsersFiles:
    """Write the weights as most people do, as a state dict."""
    torch.save(model.state_dict(), folder / "weights.pth")
    return UsersFiles(folder / "weights.pth")


@dataclass(frozen=True)
class Habit:
    """A handler with its model, and requests for it."""

    name: str
    """The name of the habit, and of its model in TorchServe."""
    handler: str
    """A file in `FILES`, which a colon and the name of a function may follow, or the name of a built-in handler."""
    model: Callable[[], nn.Module]
    """A function that makes the model, always with the same weights."""
    asks: tuple[Ask, ...]
    """The requests. The first two are the samples that `ee-archive` gets."""
    model_file: str | None = None
    """The model file, a file in `FILES`."""
    imports: tuple[str, ...] = ()
    """Files in `FILES` that the handler and the model file import."""
    write: Callable[[nn.Module, Path], UsersFiles] = state_dict
    """A function that writes the user's other files into a folder."""
    followers: Callable[[Any], Sequence[Sequence[nn.Linear]]] | None = None
    """A function from the model to the linear layers that follow each exit, with ReLU between them. It is None, and
    there are no exits, if an exit head cannot copy the layers that follow."""
    thresholds: tuple[float, ...] = (0.9, 0.6)
    """The confidence threshold of each exit."""
    refusal: Unsupported | None = None
    """The reason for which `ee-archive` refuses the habit. Without a reason, the answers must stay the same."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The fields of the `ArchiveRequest` that a user must set."""
    version: str = "1.0"
    config: str = CONFIG
    archive_format: str = "default"
    """The archive format of torch-model-archiver."""
    envelope: str | None = None
    """TorchServe's envelope around the handler."""


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
    """Return an instance of the class in a model file, scaled so that its scores for an example differ clearly."""
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
