"""More from the same records: their requests once more through the frozen backbone, augmented.

The target of a replayed image is what the backbone says about that very image, so no label is needed, and
heads see many times the recorded activations. Only the train part is augmented.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from early_exit.training.data.activation_file import Activations
from early_exit.training.data.dataset import Part, RecordedTraffic
from early_exit.training.data.preprocessing import Preprocessing
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
    """How often each record of the train part is replayed with augmentations; 0 replays all as they are."""
    pool: Side = 8
    """The side to which the activations are pooled, whatever was recorded."""
    augmentations: tuple[str, ...] = AUGMENTATIONS
    """How images are changed: only in ways whose results a request could be, so digits, say, should not be flipped.
    'mixup' averages half of the images with others: the backbone answers between the classes, which teaches a head more
    than few requests can (Beyer et al., Knowledge distillation: a good teacher is patient and consistent, CVPR 2022).
    """
    seed: int = 0


def augmentation(replay: Replay, inputs: Sequence[InputSpec]) -> Callable[[Tensor], Tensor]:
    """Return the random transform of the (B, C, H, W) input of a model.

    Raises:
        RecordError: its inputs are not images.
    """
    if not replay.rounds or not replay.augmentations:
        return lambda batch: batch
    if len(inputs) != 1 or len(inputs[0].shape) != 3:
        described = ", ".join(f"{spec.name} {spec.shape}" for spec in inputs)
        raise RecordError(f"a replay augments images, but the model's inputs are {described}: train without --replay")
    from torchvision.transforms import v2  # takes seconds, which only a replay should cost

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
    """Return (B, ...) images of any dtype, half of them weighted means with another image of the batch."""
    weight = torch.rand(len(batch)).where(torch.rand(len(batch)) < 0.5, 1.0)[:, None, None, None]
    mixed = weight * batch + (1 - weight) * batch[torch.randperm(len(batch))]
    return (mixed if batch.is_floating_point() else mixed.round()).to(batch.dtype)


def replay_records(paths: TrainingSetPaths, traffic: RecordedTraffic, layers: Sequence[CandidateLayer],
                   backbone: Backbone, handler: Preprocessing, replay: Replay, *, engine: str = DEFAULT_ENGINE,
                   on_batch: Callable[[int], object] = lambda n: None) -> TrainingSet:
    """Run the recorded requests through the backbone: all of them as they are, those of the train part augmented.

    A replay that was stopped goes on after its last full round.

    Args:
        paths: where the training set is written.
        traffic: records with request bodies.
        layers: whose activations are kept.
        backbone: of the records.
        handler: turns request bodies into the model's input.
        replay: how.
        engine: that will serve.
        on_batch: receives the number of requests that were run.

    Raises:
        RecordError: no bodies were recorded, they are to be augmented and no images, or the backbone does not answer
            them as it did when it served.
        ArchiveError, InputError: the handler does not make the model's inputs of them.
    """
    transform = augmentation(replay, backbone.description.inputs)
    train = traffic.part == list(Part).index(Part.TRAIN)
    n_train = int(train.sum())
    n_rows = len(traffic) + replay.rounds * n_train
    model = build_model(backbone, engine=engine, sampling_rate=1.0,
                        record_layers=len(backbone.description.candidates), record_pool=replay.pool)
    done = json.loads(paths.progress.read_text())["rounds"] if paths.progress.exists() else -1
    files = {layer.path: _open(paths.activations(layer.path), n_rows, pooled_shape(layer.shape, replay.pool),
                               fresh=done < 0) for layer in layers}
    answers = _open(paths.activations("answers"), n_rows, (backbone.description.n_classes,), fresh=done < 0)
    classes = _open(paths.activations("classes"), n_rows, (), np.int64, fresh=done < 0)
    full = _open(paths.activations("full"), n_rows, (), np.int64, fresh=done < 0)
    for number in range(done + 1, replay.rounds + 1):
        row = 0 if number == 0 else len(traffic) + (number - 1) * n_train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(replay.seed * 1_000_003 + number)
            for bodies in _batches(traffic, train if number else torch.ones_like(train)):
                first, *others = handler.model_inputs(bodies, backbone.description)
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
                on_batch(len(first))
        for file in (*files.values(), answers, classes, full):
            file.flush()
        if number == 0:
            _require_same(classes[torch.arange(len(traffic))], traffic.backbone_class)
        with replacing(paths.progress) as scratch:
            scratch.write_text(json.dumps({"rounds": number}))
    every = torch.arange(n_rows)
    # What was served is the truth about the records; a replay in other batches may round differently.
    backbone_class = torch.cat([traffic.backbone_class, classes[every[len(traffic):]]])
    finish(paths, layers, replay.pool, backbone.description.n_classes, {
        **columns_of(traffic), "log_probabilities": answers[every], "backbone_class": backbone_class,
        "full_class": full[every[:len(traffic)]]})
    return TrainingSet.load(paths)


def _open(path: Path, n_rows: int, shape: tuple[int, ...], dtype: type[np.generic] = np.float16, *,
          fresh: bool) -> Activations:
    return Activations.create(path, n_rows, shape, dtype) if fresh else Activations(path, writable=True)


def _batches(traffic: RecordedTraffic, wanted: Tensor) -> Iterator[list[bytes]]:
    for start, bodies in traffic.bodies():
        chosen = [body for row, body in enumerate(bodies, start) if wanted[row]]
        for first in range(0, len(chosen), _BATCH):
            yield chosen[first:first + _BATCH]


def _require_same(replayed: Tensor, recorded: Tensor) -> None:
    """Check that the requests mean today what they meant when they were served."""
    same = (replayed == recorded).double().mean().item()
    if same < _LEAST_AGREEMENT:
        raise RecordError(f"the backbone answers {1 - same:.1%} of the recorded requests differently from when it "
                          "served them: is this the archive that was recorded, and does its handler treat a body the "
                          "same without the request's headers?")
