"""A training set for exit heads without a backbone: one layer of vectors, and a teacher that is a function of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.training.data.activation_file import Activations
from early_exit.training.data.split import Part, Split
from early_exit.training.data.training_set import TrainingSet, finish
from early_exit.training.paths import TrainingSetPaths

LAYER = CandidateLayer("layer", "layer", (12,), 0.4)


def made_training_set(folder: Path, target: Callable[[Tensor], Tensor] | None = None,
                      n_records: int = 1000) -> TrainingSet:
    """Write and load a training set.

    Args:
        folder: the folder of the training set.
        target: a function from (N, 12) activations to (N, 3) logits of the backbone. It is linear by default.
        n_records: the number of records. Half of them are to train with, and the others to tune with.
    """
    paths = TrainingSetPaths(folder)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_records, 12, generator=generator)
    direction = torch.randn(12, 3, generator=generator)
    logits = 2 * x @ direction if target is None else target(x)
    file = Activations.create(paths.activations(LAYER.path), n_records, LAYER.shape)
    file.write(0, x)
    file.flush()
    part = torch.zeros(n_records, dtype=torch.int8)
    part[n_records // 2:] = list(Part).index(Part.TUNE)
    finish(paths, [LAYER], None, 3, {
        "log_probabilities": logits.log_softmax(dim=1).half(), "backbone_class": logits.argmax(dim=1),
        "full_class": logits.argmax(dim=1),
        "request": torch.arange(n_records), "row": torch.zeros(n_records, dtype=torch.int64),
        "time": torch.zeros(n_records, dtype=torch.float64)}, replace(Split.of_nothing(n_records), part=part), {})
    return TrainingSet.load(paths)
