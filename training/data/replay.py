"""Replay: run recorded requests through the frozen backbone again, with augmentations, to get more training data.

The target of a replayed image is the backbone's output for that image, so no label is needed. Heads are trained on many
times as many activations as were recorded. Only the train part is augmented.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.backbone.pooling import Side, pooled_shape
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.engines.registry import DEFAULT_ENGINE
from early_exit.handler.errors import RecordError
from early_exit.handler.files.private import replacing
from early_exit.handler.model.loading import build_model
from early_exit.handler.recording.kept_request import KeptRequest
from early_exit.training.data.activation_file import Activations
from early_exit.training.data.dataset import RecordedTraffic
from early_exit.training.data.preprocessing import Preprocessing
from early_exit.training.data.skipped import Skipped
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet, columns_of, finish
from early_exit.training.paths import TrainingSetPaths

_BATCH = 64
_LEAST_AGREEMENT = 0.98
MIXUP = "mixup"
AUGMENTATIONS = ("flip", "crop", "rotate", MIXUP)


@dataclass(frozen=True)
class Replay:
    """How records are replayed."""

    rounds: int = 6
    """How often each record of the train part is replayed with augmentations; 0 replays records only as they are."""
    pool: Side = 8
    """The side to which the activations are pooled, independent of the side in the records."""
    augmentations: tuple[str, ...] = AUGMENTATIONS
    """How images are changed. The results should be images that could be requests: digits, for example, should not be
    flipped. 'mixup' averages half of the images with others: the backbone's answers then lie between classes, which
    teaches a head more than a few requests can (Beyer et al., Knowledge distillation: a good teacher is patient and
    consistent, CVPR 2022)."""
    seed: int = 0


def augmentation(replay: Replay, inputs: Sequence[InputSpec]) -> Callable[[Tensor], Tensor]:
    """Return the random transform of the (B, C, H, W) input of a model.

    Raises:
        RecordError: the model's inputs are not images.
    """
    if not replay.rounds or not replay.augmentations:
        return lambda batch: batch
    if len(inputs) != 1 or len(inputs[0].shape) != 3:
        described = ", ".join(f"{spec.name} {spec.shape}" for spec in inputs)
        raise RecordError(f"a replay augments images, but the model's inputs are {described}: train without --replay")
    from torchvision.transforms import v2  # this import takes seconds, and only a replay needs it

    height, width = inputs[0].shape[1:]
    known: dict[str, v2.Transform] = {
        "flip": v2.RandomHorizontalFlip(),
        "crop": v2.RandomCrop((height, width), padding=(max(1, width // 8), max(1, height // 8)),
                              padding_mode="reflect"),
        "rotate": v2.RandomApply([v2.RandomRotation(10)], p=0.3),
    }
    of_each = [known[name] for name in replay.augmentations if name != MIXUP]

    def transform(batch: Tensor) -> Tensor:
        for augment in of_each:
            batch = torch.stack([augment(image) for image in batch])
        return _mixed(batch) if MIXUP in replay.augmentations else batch

    return transform


def _mixed(batch: Tensor) -> Tensor:
    """Return (B, ...) images of any dtype; half of them are weighted means with another image of the batch."""
    weight = torch.rand(len(batch)).where(torch.rand(len(batch)) < 0.5, 1.0)[:, None, None, None]
    mixed = weight * batch + (1 - weight) * batch[torch.randperm(len(batch))]
    return (mixed if batch.is_floating_point() else mixed.round()).to(batch.dtype)


@dataclass
class _Progress:
    """The progress of a replay."""

    rounds: int = -1
    """The last round that is finished. In the first round, number 0, all requests are run as they are."""
    n_rows: int = 0
    """The number of rows that the finished rounds have written."""
    failed: list[int] = field(default_factory=list)
    """The records that could not be run as they are; they are not tried again."""
    skipped: dict[str, int] = field(default_factory=dict)
    """The number of requests that were skipped, by reason."""

    @classmethod
    def load(cls, path: Path) -> _Progress:
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, path: Path) -> None:
        with replacing(path) as scratch:
            scratch.write_text(json.dumps(self.__dict__))


def replay_records(paths: TrainingSetPaths, traffic: RecordedTraffic, layers: Sequence[CandidateLayer],
                   backbone: Backbone, handler: Preprocessing, replay: Replay, *, engine: str = DEFAULT_ENGINE,
                   on_batch: Callable[[int], object] = lambda n: None,
                   log: Callable[[str], None] = lambda line: None, most_skipped: float = 1.0) -> TrainingSet:
    """Run all recorded requests through the backbone as they are, and those of the train part with augmentations, too.

    A replay that was stopped continues after its last complete round. A request on which the handler fails is not in
    the training set; the training set and the log tell how many such requests there are, and why.

    Args:
        paths: the files to write.
        traffic: the records, whose requests were kept.
        layers: the layers whose activations are stored.
        backbone: the backbone of the records.
        handler: turns requests into the model's input.
        replay: the options of the replay.
        engine: the engine that will serve.
        on_batch: receives the number of requests in each batch, including those that are skipped.
        log: receives a line for each reason why requests are skipped.
        most_skipped: the largest share of the records that certify that may be skipped, because no certificate is about
            those.

    Raises:
        RecordError: no requests were kept, the requests to augment are not images, the handler fails on all requests,
            or on too many of those that certify, or the backbone does not answer them as it did when it served.
    """
    transform = augmentation(replay, backbone.description.inputs)
    every, train = torch.ones(len(traffic), dtype=torch.bool), traffic.part == Part.TRAIN.number
    most_rows = len(traffic) + replay.rounds * int(train.sum())
    model = build_model(backbone, engine=engine, sampling_rate=1.0,
                        record_layers=len(backbone.description.candidates), record_pool=replay.pool)
    progress = _Progress.load(paths.progress)
    is_new = progress.rounds < 0
    files = {layer.path: _open(paths.activations(layer.path), most_rows, pooled_shape(layer.shape, replay.pool),
                               fresh=is_new) for layer in layers}
    answers = _open(paths.activations(".answers"), most_rows, (backbone.description.n_classes,), fresh=is_new)
    classes = _open(paths.activations(".classes"), most_rows, (), np.int64, fresh=is_new)
    full = _open(paths.activations(".full"), most_rows, (), np.int64, fresh=is_new)
    for number in range(progress.rounds + 1, replay.rounds + 1):
        skipped, row = Skipped(progress.skipped), progress.n_rows
        runs = _without(train if number else every, progress.failed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(replay.seed * 1_000_003 + number)
            for records, requests in _batches(traffic, runs):
                positions, inputs = handler.model_inputs(requests, backbone.description, skipped)
                if number == 0:
                    progress.failed += [record for position, record in enumerate(records) if position not in positions]
                on_batch(len(requests))
                if not positions:
                    continue
                first, *others = inputs
                with torch.no_grad():
                    model(transform(first) if number else first, *others)
                served = model.log.take()[0]
                for path, file in files.items():
                    file.write(row, served.activations[path])
                scores = backbone.description.scores.log_probabilities(served.answers.reference.float())
                answers.write(row, scores.half())
                classes.write(row, scores.argmax(dim=1))
                full.write(row, served.full_class)
                row += len(first)
        for file in (*files.values(), answers, classes, full):
            file.flush()
        if number == 0:
            skipped.report(len(traffic), log)
            _require_few(traffic.part == Part.CERTIFY.number, progress.failed, most_skipped)
            _require_same(classes[torch.arange(row)], traffic.where(_without(every, progress.failed)).backbone_class)
        progress = _Progress(number, row, progress.failed, skipped.counts)
        progress.save(paths.progress)
    traffic = traffic.where(_without(every, progress.failed))
    rows, as_recorded = torch.arange(progress.n_rows), torch.arange(len(traffic))
    # A record keeps the class that the backbone predicted in service: a replay in other batches may round differently.
    backbone_class = torch.cat([traffic.backbone_class, classes[rows[len(traffic):]]])
    finish(paths, layers, replay.pool, backbone.description.n_classes, {
        **columns_of(traffic), "log_probabilities": answers[rows], "backbone_class": backbone_class,
        "full_class": full[as_recorded]}, traffic.split, {**progress.skipped, **traffic.skipped})
    return TrainingSet.load(paths)


def _require_few(certifies: Tensor, failed: Sequence[int], most: float) -> None:
    """Check that few of the records that certify are skipped: those that are may be of a kind of their own.

    Args:
        certifies: (N,) bool: the records that certify.
        failed: the positions of the skipped records among the N.
        most: the largest share of the records that certify that may be skipped.
    """
    n, n_failed = int(certifies.sum()), int(certifies[torch.tensor(failed, dtype=torch.int64)].sum())
    if n_failed > most * n:
        raise RecordError(f"{n_failed} of the {n} requests that certify cannot be run again, for the reasons above, so "
                          "the certificate would not be about such requests: train without --replay, or mend the "
                          "reasons and record anew")


def _without(mask: Tensor, records: Sequence[int]) -> Tensor:
    """Return a (N,) bool mask without some of its N records."""
    return mask.index_fill(0, torch.tensor(records, dtype=torch.int64), False)


def _open(path: Path, n_rows: int, shape: tuple[int, ...], dtype: type[np.generic] = np.float16, *,
          fresh: bool) -> Activations:
    return Activations.create(path, n_rows, shape, dtype) if fresh else Activations(path, writable=True)


def _batches(traffic: RecordedTraffic, wanted: Tensor) -> Iterator[tuple[list[int], list[KeptRequest | None]]]:
    """Yield batches: the numbers of the records, and their requests as the handler received them."""
    for start, requests in traffic.kept():
        chosen = [(record, request) for record, request in enumerate(requests, start) if wanted[record]]
        for first in range(0, len(chosen), _BATCH):
            records, of_batch = zip(*chosen[first:first + _BATCH])
            yield [*records], [*of_batch]


def _require_same(replayed: Tensor, recorded: Tensor) -> None:
    """Check that the backbone predicts the (N,) classes that it predicted when it served the requests."""
    same = (replayed == recorded).double().mean().item()
    if same < _LEAST_AGREEMENT:
        raise RecordError(f"the backbone answers {1 - same:.1%} of the recorded requests differently from when it "
                          "served them: is this the archive that was recorded, and does its handler treat a request "
                          "the same without the client's headers?")
