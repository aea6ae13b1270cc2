"""The description of a user's handler, found by `ee-archive`: the place of its model, and the owners of its rows."""

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
    """The object from which a place is reached."""

    HANDLER = "handler"
    """The object whose `handle()` TorchServe calls."""
    MODULE = "module"
    """The module of the handler: its global names."""


@dataclass(frozen=True)
class Place:
    """A place in which a user's code keeps its model, such as `self.model` or `_service.models["cats"]`."""

    root: Root
    steps: tuple[tuple[str, str | int], ...]
    """The steps from the root: ("attribute", name), or ("item", key or index)."""

    def __str__(self) -> str:
        steps = "".join(f".{step}" if kind == "attribute" else f"[{step!r}]" for kind, step in self.steps)
        return f"self{steps}" if self.root is Root.HANDLER else steps.removeprefix(".")


class Loading(str, Enum):
    """How a handler gets a model while it is initialized."""

    GIVEN = "given"
    """TorchServe's base handler is given our model instead of reading a file, so the archive holds no weights."""
    OWN = "own"
    """The handler loads the user's model, which is freed after our model has replaced it."""
    KEPT = "kept"
    """As `OWN`, but the user's model is kept, because the handler asks it for more than its answers."""


@dataclass(frozen=True)
class HandlerDescription:
    """The description of a handler; the defaults are those for older archives, which have no such description."""

    model: tuple[Place, ...] = (Place(Root.HANDLER, (("attribute", "model"),)),)
    """All places of the model that the handler calls."""
    loading: Loading = Loading.GIVEN
    rows_per_request: int | None = 1
    """The number of rows of the model's input that each request becomes, side by side in the order of the requests;
    None if it is not known which rows belong to which request."""
    rows_unknown_because: str = ""
    """The reason why it is not known, as a clause that can follow 'because'."""
    service_envelope: str | None = None
    """TorchServe's envelope around the handler, which receives the samples. A request may then have several instances,
    and `rows_per_request` is the number of rows of each instance."""
    is_used_as_given: bool = False
    """Whether the handler uses a given model as it is: a worker refuses one that changes or wraps it, because ours does
    not have the change. False for a model that is not in the archive, and for older archives."""
    files: Mapping[str, str] | None = None
    """The user's files by name, with the sha256 of each at the time the archive was made; see `traffic`."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(HANDLER.stamped(asdict(self)), indent=1))

    @classmethod
    def load(cls, path: Path) -> HandlerDescription:
        """Read a description; if the file is missing, return the description for older archives.

        Raises:
            FormatError: this version does not read its format.
            ArchiveError: the file cannot be read, or is not a description.
        """
        if not path.exists():
            return cls()
        try:
            return cls.from_json(json.loads(path.read_text()), str(path))
        except (OSError, ValueError) as error:
            raise ArchiveError(f"cannot read the description of the handler in {path}: {error}") from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> HandlerDescription:
        """Read the output of `save`; errors name the source.

        Raises:
            FormatError: this version does not read its format.
            ArchiveError: the data is not a description.
        """
        HANDLER.require(data, source)
        try:
            return cls(
                model=tuple(Place(Root(place["root"]), tuple((kind, step) for kind, step in place["steps"]))
                            for place in data["model"]),
                loading=Loading(data["loading"]), rows_per_request=data["rows_per_request"],
                rows_unknown_because=data["rows_unknown_because"], service_envelope=data.get("service_envelope"),
                is_used_as_given=data.get("is_used_as_given", False), files=data.get("files"))
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveError(f"{source} is not a complete description of a handler: {error!r}") from error
