"""What the baselines get: the same activations as our heads, and labels, which our heads do not need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.handler.candidates import CandidateLayer
from early_exit.handler.head import Head, HeadSpec
from early_exit.training.distill import Distillation, train_head

SPEC = HeadSpec(pool=4, widths=(64,))
"""All methods have heads of the same capacity."""


@dataclass(frozen=True)
class LabelledRecords:
    """N requests with their true classes."""

    layers: tuple[CandidateLayer, ...]
    """Candidates, in the order of the backbone."""
    pooled: Mapping[str, Tensor]
    """By layer path: (N, C, h, w) float32 activations pooled to 4x4."""
    labels: Tensor
    """(N,) int64."""
    backbone_class: Tensor
    """(N,) int64."""
    n_classes: int
    train: Tensor
    """(M,) rows to train with."""
    tune: Tensor
    """(V,) rows to choose thresholds with."""

    def labelled_head(self, layer: CandidateLayer, seed: int = 0) -> Head:
        """Train a head with cross-entropy against the labels."""
        # KL against a distribution that is all on the label is the cross-entropy.
        certain = torch.nn.functional.one_hot(self.labels, self.n_classes).float().log()
        return train_head(SPEC, layer.shape, self.pooled[layer.path][self.train], certain[self.train],
                          Distillation(seed=seed))

    def loss(self, answers: Sequence[Tensor], leaves: Sequence[Tensor], rows: Tensor) -> float:
        """Return the loss of accuracy on some rows when exits answer in order.

        Args:
            answers: for each exit, the (M,) classes it would answer.
            leaves: for each exit, the (M,) bool rows that it would let go.
            rows: (M,) rows.
        """
        served = self.backbone_class[rows].clone()
        waiting = torch.ones(len(rows), dtype=torch.bool)
        for answer, leave in zip(answers, leaves):
            served = torch.where(waiting & leave, answer, served)
            waiting &= ~leave
        labels = self.labels[rows]
        right = (self.backbone_class[rows] == labels).double().mean() - (served == labels).double().mean()
        return float(right)


def most_aggressive(levels: Sequence[float], loss: Callable[[float], float], max_loss: float) -> float | None:
    """Return the last of the levels, from careful to aggressive, before the loss first exceeds what is allowed."""
    best = None
    for level in levels:
        if loss(level) > max_loss:
            break
        best = level
    return best
