"""What `ee-archive` is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from early_exit.archiver.packaging.sources.detector import PEDESTRIAN
from early_exit.archiver.packaging.sources.form import FormFile
from early_exit.handler.backbone.image_class import Strategy
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.files.names import bare_name

ENVELOPES = ("json", "kserve", "kservev2")
"""TorchServe's, by what `service_envelope` calls them."""


@dataclass(frozen=True)
class ArchiveRequest:
    """An archive that is to be built: from what, where to, and what is to be in it.

    Raises:
        ArchiveError: its name or version leads out of the folder that it is published into.
    """

    source: str
    """A .mar, the same as .tar.gz or as a folder, a .pt2, or a factory as package.module:function."""
    to: Path
    """Folder that the archive is published into; it is created where it is missing."""
    plan: Path | None = None
    """File with the exit plan; without one the archive answers every request in full."""
    version: str | None = None
    """Version of the model, by default one above the source's."""
    model_name: str | None = None
    """Name of the model, by default the source's."""
    weights: Path | None = None
    """State dict for a factory."""
    input_shape: tuple[int, ...] | None = None
    """Shape of one item; by default that of what the handler makes of the sample request."""
    inputs: tuple[InputSpec, ...] = ()
    """Specifications instead of a shape, for a model with several inputs or with integers."""
    handler: str | None = None
    """File or name of a built-in handler, for a factory or .pt2."""
    extra_files: Sequence[Path] = field(default_factory=tuple)
    """Files that the handler needs beside it, for a factory or .pt2."""
    config: Path | None = None
    """File that replaces the source's model-config.yaml."""
    engine: str | None = None
    """Engine to write into model-config.yaml, its only owner: an archive without a plan is executed by one too."""
    calibrate: Path | None = None
    """Folder with recorded requests, for an engine that is made from them."""
    requests: Sequence[Path] = field(default_factory=tuple)
    """Files with the bodies of typical requests, best two that differ."""
    content_type: str | None = None
    """Of the requests; by default what the names of their files say."""
    service_envelope: str | None = None
    """TorchServe's envelope around the handler where it serves, which takes the requests."""
    form: Sequence[FormFile] = field(default_factory=tuple)
    """Files with the parts of one more request."""
    output: str | None = None
    """Name or index of the scores in what the model returns, where several of its outputs could be them."""
    strategy: Strategy | None = None
    """What the class of an image is, for a detector; by default its most confident object."""
    pedestrian: int = PEDESTRIAN
    """Label of pedestrians, for a detector."""

    def __post_init__(self) -> None:
        for what, name in (("model name", self.model_name), ("version", self.version)):
            if name is not None:
                bare_name(name, f"the {what}")
