"""What `ee-archive` found out about a user's handler: where its model is, and whose the rows of its input are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from early_exit.handler.errors import ArchiveError
from early_exit.handler.formats import HANDLER


class Root(str, Enum):
    """Where the way to a model begins."""

    HANDLER = "handler"
    """The object whose `handle()` TorchServe calls."""
    MODULE = "module"
    """The module of the handler: its global names."""


@dataclass(frozen=True)
class Place:
    """A place in which a user's code keeps its model, such as `self.model` or `_service.models["cats"]`."""

    root: Root
    steps: tuple[tuple[str, str | int], ...]
    """From the root on: ("attribute", name), or ("item", key or index)."""

    def __str__(self) -> str:
        steps = "".join(f".{step}" if kind == "attribute" else f"[{step!r}]" for kind, step in self.steps)
        return f"self{steps}" if self.root is Root.HANDLER else steps.removeprefix(".")


class Loading(str, Enum):
    """Who loads what the handler finds in place of its model until it has been initialized."""

    GIVEN = "given"
    """TorchServe's base handler is given our model instead of reading a file, so the archive holds no weights."""
    OWN = "own"
    """The handler loads the user's model, which is let go once ours has taken its place."""
    KEPT = "kept"
    """As `OWN`, but the user's model stays: the handler asks it for more than its answers."""


@dataclass(frozen=True)
class HandlerDescription:
    """What is known of a handler; the defaults are those of archives that were made before this was written down."""

    model: tuple[Place, ...] = (Place(Root.HANDLER, (("attribute", "model"),)),)
    """All places of the model that the handler calls."""
    loading: Loading = Loading.GIVEN
    rows_per_request: int | None = 1
    """How many rows of the model's input each request becomes, those of a request side by side in the order of the
    requests; None where it is not known which rows belong to which request."""
    rows_unknown_because: str = ""
    """Why it is not known: what follows a 'because'."""
    service_envelope: str | None = None
    """TorchServe's envelope around the handler, which takes the samples; a request may then be several instances, each
    of which counts as one in `rows_per_request`."""
    files: Mapping[str, str] | None = None
    """The user's files by name, with the sha256 of each where the archive was made; see `traffic`."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(HANDLER.stamped(asdict(self)), indent=1))

    @classmethod
    def load(cls, path: Path) -> HandlerDescription:
        """Read a description; where the file is missing, that of an archive of before.

        Raises:
            FormatError: its format is not one that this version reads.
            ArchiveError: it cannot be read, or is not a description.
        """
        if not path.exists():
            return cls()
        try:
            return cls.from_json(json.loads(path.read_text()), str(path))
        except (OSError, ValueError) as error:
            raise ArchiveError(f"cannot read the description of the handler in {path}: {error}") from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> HandlerDescription:
        """Read what `save` wrote; errors name the source.

        Raises:
            FormatError: its format is not one that this version reads.
            ArchiveError: it is not a description.
        """
        HANDLER.require(data, source)
        try:
            return cls(
                model=tuple(Place(Root(place["root"]), tuple((kind, step) for kind, step in place["steps"]))
                            for place in data["model"]),
                loading=Loading(data["loading"]), rows_per_request=data["rows_per_request"],
                rows_unknown_because=data["rows_unknown_because"], service_envelope=data.get("service_envelope"),
                files=data.get("files"))
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveError(f"{source} is not a complete description of a handler: {error!r}") from error
