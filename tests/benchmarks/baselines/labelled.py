"""What the baselines get: the same activations as our heads, and labels, which our heads do not need."""

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
    """N requests with their true classes, replays of them included."""

    layers: tuple[CandidateLayer, ...]
    """Candidates, in the order of the backbone."""
    recorded: Side
    """Side to which the activations are pooled."""
    pooled: Mapping[str, Activations | Tensor]
    """By layer path: (N, ...) activations, as recorded."""
    labels: Tensor
    """(N,) int64."""
    backbone_class: Tensor
    """(N,) int64."""
    n_classes: int
    train: Tensor
    """(M,) rows to train with."""
    tune: Tensor
    """(V,) rows to choose thresholds with."""
    trained: dict[str, Head] = field(default_factory=dict)
    """By layer path: the heads that were trained so far, of these records and of `of_layers`."""

    def of_layers(self, layers: Sequence[CandidateLayer]) -> LabelledRecords:
        """Return the same with some of the layers."""
        return replace(self, layers=tuple(layers))

    @property
    def spec(self) -> HeadSpec:
        """The head of every layer: our default, which reads records as they are."""
        return HeadSpec(pool=self.recorded, recorded=self.recorded)

    @property
    def heads(self) -> dict[str, Head]:
        """By layer path: heads trained with cross-entropy against the labels."""
        for layer in self.layers:
            if layer.path not in self.trained:
                # KL against a distribution that is all on the label is the cross-entropy.
                certain = torch.nn.functional.one_hot(self.labels[self.train], self.n_classes).float().log()
                self.trained[layer.path] = train_head(
                    self.spec, layer.shape, Selected(self.pooled[layer.path], self.train), certain, Distillation())
        return {layer.path: self.trained[layer.path] for layer in self.layers}

    def logits(self, rows: Tensor) -> list[Tensor]:
        """Return what each of the heads says, (M, K), of some rows."""
        return [head.classify(self.spec.reads(self.pooled[path][rows].float())) for path, head in self.heads.items()]

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
