"""What the baselines get: the same activations as our heads, and also labels, which our heads do not need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.backbone.pooling import Side
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.training.data.activation_file import Activations, Selected
from early_exit.training.heads.distill import Distillation, train_head


@dataclass(frozen=True)
class LabelledRecords:
    """The activations and true classes of N requests, which include replays."""

    layers: tuple[CandidateLayer, ...]
    """The candidate layers, in the order of the backbone."""
    recorded: Side
    """The side to which the activations are pooled."""
    pooled: Mapping[str, Activations | Tensor]
    """The activations as they were recorded, (N, ...). Keys are layer paths."""
    labels: Tensor
    """The true classes, (N,) int64."""
    backbone_class: Tensor
    """The classes that the backbone predicts, (N,) int64."""
    n_classes: int
    train: Tensor
    """The rows to train with, (M,)."""
    tune: Tensor
    """The rows to choose thresholds with, (V,)."""
    trained: dict[str, Head] = field(default_factory=dict)
    """The heads that were trained so far, shared with the results of `of_layers`. Keys are layer paths."""

    def of_layers(self, layers: Sequence[CandidateLayer]) -> LabelledRecords:
        """Return the same records with some of the layers only."""
        return replace(self, layers=tuple(layers))

    @property
    def spec(self) -> HeadSpec:
        """The specification of every layer's head: our default, which does not pool recorded activations further."""
        return HeadSpec(pool=self.recorded, recorded=self.recorded)

    @property
    def heads(self) -> dict[str, Head]:
        """The heads, trained with cross-entropy against the labels. Keys are layer paths."""
        for layer in self.layers:
            if layer.path not in self.trained:
                # The KL divergence for a target with all of its mass on the label is the cross-entropy.
                certain = torch.nn.functional.one_hot(self.labels[self.train], self.n_classes).float().log()
                self.trained[layer.path] = train_head(
                    self.spec, layer.shape, Selected(self.pooled[layer.path], self.train), certain, Distillation())
        return {layer.path: self.trained[layer.path] for layer in self.layers}

    def logits(self, rows: Tensor) -> list[Tensor]:
        """Return the logits of each head for some rows, (M, K)."""
        return [head.classify(self.spec.reads(self.pooled[path][rows].float())) for path, head in self.heads.items()]

    def loss(self, answers: Sequence[Tensor], leaves: Sequence[Tensor], rows: Tensor) -> float:
        """Return the loss in accuracy on some rows when exits answer in order.

        Args:
            answers: for each exit, the classes that it would answer, (M,).
            leaves: for each exit, a bool mask of the rows that it would let leave, (M,).
            rows: the rows, (M,).
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
    """Return the last of the levels, ordered from careful to aggressive, before the loss first exceeds `max_loss`."""
    best = None
    for level in levels:
        if loss(level) > max_loss:
            break
        best = level
    return best
