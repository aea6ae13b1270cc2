"""The training set of a run: its records and their replays, in files. Only a small part of the files is in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.backbone.pooling import Side, pooled_shape
from early_exit.handler.files.private import replacing
from early_exit.training.data.activation_file import Activations
from early_exit.training.data.dataset import RecordedTraffic
from early_exit.training.data.split import Part, Split
from early_exit.training.paths import TrainingSetPaths

_MOST_EXCEPTIONS = 0.01
"""The largest share of rows that float16 cannot hold in a layer that is used."""


@dataclass(frozen=True)
class TrainingSet:
    """N records, followed by R replays of the train part."""

    layers: tuple[CandidateLayer, ...]
    """The candidates that have activations, in order."""
    recorded: Side
    """The side to which the activations are pooled."""
    n_classes: int
    paths: TrainingSetPaths
    log_probabilities: Tensor
    """(N + R, K) float16: the backbone's distributions."""
    backbone_class: Tensor
    """(N + R,) int64: the class the backbone predicts."""
    full_class: Tensor
    """(N,) int64: the class that the engine predicts in service without exits. It is `NO_CLASS` where only the scores
    of a lossy engine are not finite."""
    split: Split
    """The parts of the records, and the blocks that each count as one piece of evidence."""
    request: Tensor
    """(N,) int64: hash of each record's request id."""
    row: Tensor
    """(N,) int64: which instance of its request each record is."""
    time: Tensor
    """(N,) float64: Unix seconds."""
    finite: Tensor
    """(N + R,) bool: whether float16 can hold the activations at all layers, and the scores are numbers."""
    skipped: Mapping[str, int]
    """How many requests the recording server or a replay skipped, by reason."""

    @property
    def n_records(self) -> int:
        return len(self.split.part)

    def rows(self, part: Part) -> Tensor:
        """Return the (M,) rows of a part; replays belong to the train part.

        Rows that float16 cannot hold are left out, except in the certify part, where they count as errors of all exits.
        """
        rows = self.split.rows(part)
        if part is Part.TRAIN:
            rows = torch.cat([rows, torch.arange(self.n_records, len(self.log_probabilities))])
        return rows if part is Part.CERTIFY else rows[self.finite[rows]]

    def activations(self, layer: CandidateLayer) -> Activations:
        """Return the (N + R, ...) activations of a layer."""
        return Activations(self.paths.activations(layer.path))

    @classmethod
    def load(cls, paths: TrainingSetPaths) -> TrainingSet:
        """Read what `prepare` or a replay wrote."""
        index: dict[str, Any] = json.loads(paths.index.read_text())
        tensors = load_file(paths.columns)
        columns = {name: column for name, column in tensors.items() if name in cls.__dataclass_fields__}
        return cls(layers=tuple(CandidateLayer.from_json(layer) for layer in index["layers"]),
                   recorded=index["recorded"], n_classes=index["n_classes"], paths=paths, skipped=index["skipped"],
                   split=Split.from_tensors(tensors), **columns)


def prepare(paths: TrainingSetPaths, traffic: RecordedTraffic, layers: Sequence[CandidateLayer],
            n_classes: int, recorded: Side) -> TrainingSet:
    """Collect the activations of each layer, unless the training set is complete already.

    Afterwards the run no longer needs the shards, which the servers may delete.
    """
    if not paths.index.exists():
        for layer in layers:
            out = Activations.create(paths.activations(layer.path), len(traffic), pooled_shape(layer.shape, recorded))
            for start, values in traffic.activation(layer.path):
                out.write(start, values)
            out.flush()
        finish(paths, layers, recorded, n_classes, columns_of(traffic), traffic.split, traffic.skipped)
    return TrainingSet.load(paths)


def columns_of(traffic: RecordedTraffic) -> dict[str, Tensor]:
    """Return the columns of a training set that holds recorded traffic and no replays of it."""
    return {name: getattr(traffic, name)
            for name in ("log_probabilities", "backbone_class", "full_class", "request", "row", "time")}


def finish(paths: TrainingSetPaths, layers: Sequence[CandidateLayer], recorded: Side, n_classes: int,
           columns: Mapping[str, Tensor], split: Split, skipped: Mapping[str, int]) -> None:
    """Write the columns, and then the index, which marks the training set as complete.

    A layer is left out if float16 cannot hold its activations in more than a few rows, because a head would read other
    values in service. If there are only a few such rows, the layer stays, and the rows are marked as not finite.
    """
    finite = {layer: Activations(paths.activations(layer.path)).finite_rows() for layer in layers}
    layers = [layer for layer in layers if (~finite[layer]).double().mean() <= _MOST_EXCEPTIONS]
    all_finite = ~columns["log_probabilities"].isnan().any(dim=1)  # a replayed image may have no finite scores
    for layer in layers:
        all_finite &= finite[layer][:len(all_finite)]  # a replay may have skipped some records
    tensors = {**columns, **split.to_tensors(), "finite": all_finite}
    with replacing(paths.columns) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
    index = {"layers": [layer.to_json() for layer in layers], "recorded": recorded, "n_classes": n_classes,
             "skipped": dict(skipped)}
    with replacing(paths.index) as scratch:
        scratch.write_text(json.dumps(index, indent=1))
