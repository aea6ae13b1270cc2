"""The class of an image for a detector, defined so that exits can learn it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.files.names import bare_name

CERTAIN = 0.5
"""Detections with a score below this do not determine the class of an image."""


class Strategy(str, Enum):
    """The definition of the class of an image, in which 0 means that there is no object.

    The three definitions are the paper's three ways to update exits.
    """

    OBJECT = "most-confident-object"
    """The label of the detection with the highest score, or 0 if this score is below `CERTAIN`."""
    PEDESTRIAN = "most-confident-pedestrian"
    """Whether there is a pedestrian."""
    ALL = "all-objects"
    """The label with the largest sum of scores over all detections with a score of at least `CERTAIN`, or 0 if there
    are none."""


@dataclass(frozen=True)
class DetectorSpec:
    """A detector in `backbone.json`."""

    model_file: str
    """Name of the file in the user's archive that defines the class of the detector."""
    strategy: Strategy
    pedestrian: int
    """Label of pedestrians."""
    tail: str
    """Identity of the tail: the layers after the backbone's stages, which the graph calls by this identity."""

    def __post_init__(self) -> None:
        bare_name(self.model_file, "the model file of a detector")  # the code in this file will be run

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DetectorSpec:
        return cls(**{**data, "strategy": Strategy(data["strategy"])})

    def labels(self, classes: Tensor) -> Tensor:
        """Return the detector's labels for (B,) classes."""
        return classes * self.pedestrian if self.strategy is Strategy.PEDESTRIAN else classes


def class_scores(labels: Tensor, scores: Tensor, n_labels: int, strategy: Strategy, pedestrian: int) -> Tensor:
    """Return the (K,) probabilities of an image's classes; K is 2 for pedestrians, otherwise the number of labels.

    Args:
        labels: (N,) int64 labels of the detections.
        scores: (N,) scores of the detections, in [0, 1].
        n_labels: the number of labels, including 0 for the background.
        strategy: the definition of the class of an image.
        pedestrian: the label of pedestrians.
    """
    best = scores.new_zeros(n_labels).scatter_reduce(0, labels, scores, "amax")
    if strategy is Strategy.PEDESTRIAN:
        return torch.stack([1 - best[pedestrian], best[pedestrian]])
    weights = best
    if strategy is Strategy.ALL and (certain := scores >= CERTAIN).any():
        weights = torch.zeros_like(best).index_add(0, labels[certain], scores[certain])
    weights[0] = 1 - best.amax()
    return weights / weights.sum()
