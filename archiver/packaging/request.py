"""The options of `ee-archive`: the archive to build."""

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
"""TorchServe's envelopes, by their names in `service_envelope`."""


@dataclass(frozen=True)
class ArchiveRequest:
    """An archive to build: its source, its place and its contents.

    Raises:
        ArchiveError: the model name or version leads out of the folder into which the archive is published.
    """

    source: str
    """A .mar, a .tar.gz or a folder of torch-model-archiver, a .pt2, or a factory as package.module:function."""
    to: Path
    """The folder into which the archive is published; it is created if it is missing."""
    plan: Path | None = None
    """The file with the exit plan; without one, the archive answers every request in full."""
    version: str | None = None
    """The version of the model; by default one above the source's."""
    model_name: str | None = None
    """The name of the model; by default the source's."""
    weights: Path | None = None
    """The state dict for a factory."""
    input_shape: tuple[int, ...] | None = None
    """The shape of one item; by default the shape that the handler makes of the sample request."""
    inputs: tuple[InputSpec, ...] = ()
    """Specifications instead of a shape, for a model with several inputs or with integers."""
    handler: str | None = None
    """The file, or the name of a built-in handler, for a factory or .pt2."""
    extra_files: Sequence[Path] = field(default_factory=tuple)
    """Further files that the handler needs, for a factory or .pt2."""
    config: Path | None = None
    """The file that replaces the source's model-config.yaml."""
    engine: str | None = None
    """The engine to write into model-config.yaml. Only that file names the engine, because archives without a plan have
    an engine, too."""
    calibrate: Path | None = None
    """The folder with recorded requests, for an engine that is made from them."""
    requests: Sequence[Path] = field(default_factory=tuple)
    """Files with the bodies of typical requests, preferably two that differ."""
    content_type: str | None = None
    """The content type of the requests; by default their file names tell it."""
    service_envelope: str | None = None
    """TorchServe's envelope around the handler in service; the sample requests are in this envelope."""
    form: Sequence[FormFile] = field(default_factory=tuple)
    """Files with the parts of one more request."""
    output: str | None = None
    """The name or index of the scores in the model's output, if several outputs could be the scores."""
    strategy: Strategy | None = None
    """For a detector: how the class of an image is defined; by default as the class of its most confident object."""
    pedestrian: int = PEDESTRIAN
    """For a detector: the label of pedestrians."""

    def __post_init__(self) -> None:
        for what, name in (("model name", self.model_name), ("version", self.version)):
            if name is not None:
                bare_name(name, f"the {what}")
