"""The performance of exits: hits, agreement, accuracy and the categories of Table 1, at one or at many thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from early_exit.training.costs.cost import Costs
from early_exit.training.planning.predictions import PartPredictions
from early_exit.training.selection.simulation import OperatingPoint, mean_cost, outcome, served_classes

CURVE_THRESHOLDS = tuple(step / 100 for step in range(101))


@dataclass(frozen=True)
class Categories:
    """The numbers of answers with a known label by category of Table 1. In B, the backbone is right; in C, the exit is.
    """

    both_right: int
    """BC: both are right."""
    same_mistake: int
    """Not (BC): both give the same class, which is wrong."""
    only_backbone: int
    """B and not C: these answers cost accuracy."""
    only_exit: int
    """C and not B: these answers gain accuracy."""
    other_mistake: int
    """Neither B nor C: they give different classes, both wrong."""

    @property
    def total(self) -> int:
        return self.both_right + self.same_mistake + self.only_backbone + self.only_exit + self.other_mistake


def categorize(answer: Tensor, backbone_class: Tensor, truth: Tensor) -> Categories:
    """Return the categories of N answers.

    Args:
        answer: (N,) int64 classes of exits.
        backbone_class: (N,) int64.
        truth: (N,) int64, -1 where unknown; such answers are in no category.

    >>> import torch
    >>> categorize(torch.tensor([1, 2, 2, 1]), torch.tensor([1, 2, 1, 2]), torch.tensor([1, 1, 1, -1]))
    Categories(both_right=1, same_mistake=1, only_backbone=1, only_exit=0, other_mistake=0)
    """
    known, same = truth >= 0, answer == backbone_class
    exit_right, backbone_right = known & (answer == truth), known & (backbone_class == truth)
    groups = (exit_right & backbone_right, known & same & ~exit_right, backbone_right & ~exit_right,
              exit_right & ~backbone_right, known & ~same & ~exit_right & ~backbone_right)
    return Categories(*(int(group.sum()) for group in groups))


@dataclass(frozen=True)
class Performance:
    """The performance of an exit on those of N records that leave at it (Tables 1 and 2)."""

    hit_rate: float
    """The share of the records that leave here."""
    agreement: float | None
    """The share of the records leaving here whose answer is the backbone's; None if no record leaves."""
    accuracy: float | None
    """The share of the labelled records leaving here that are answered correctly; None if there are no such records."""
    effect: float | None
    """F(theta), equation 2: the change that the answers given here make to the accuracy on all labelled records; None
    if no record has a label."""
    bound: float
    """Hit rate x (1 - agreement), equation 3: this exit cannot lower the accuracy by more."""
    categories: Categories | None
    """The categories of the labelled records leaving here; None if no record has a label."""


def performance(leaves: Tensor, answers: Tensor, predictions: PartPredictions) -> Performance:
    """Return the performance of an exit on the records that leave at it.

    Args:
        leaves: (N,) bool: the records that leave.
        answers: (N,) int64 classes of the exit.
        predictions: the predictions for the part with the N records.
    """
    n_hits, n_known = int(leaves.sum()), int((predictions.labels >= 0).sum())
    n_agree = int((answers == predictions.teacher)[leaves].sum())
    categories = categorize(answers[leaves], predictions.teacher[leaves], predictions.labels[leaves])
    return Performance(
        hit_rate=n_hits / len(predictions), agreement=n_agree / n_hits if n_hits else None,
        accuracy=(categories.both_right + categories.only_exit) / categories.total if categories.total else None,
        effect=(categories.only_exit - categories.only_backbone) / n_known if n_known else None,
        bound=(n_hits - n_agree) / len(predictions), categories=categories if n_known else None)


@dataclass(frozen=True)
class Curve:
    """One head alone at every threshold (Figure 2); agreement and accuracy are None where no record leaves."""

    layer: str
    thresholds: tuple[float, ...]
    hit_rate: tuple[float, ...]
    agreement: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


def curve(layer: str, index: int, predictions: PartPredictions) -> Curve:
    """Return the curve of the candidate with the given index, on the records of a part."""
    confidence, answers = predictions.candidates.confidence[:, index], predictions.answers[:, index]
    points = [performance(confidence >= threshold, answers, predictions) for threshold in CURVE_THRESHOLDS]
    return Curve(layer, CURVE_THRESHOLDS, tuple(point.hit_rate for point in points),
                 tuple(point.agreement for point in points), tuple(point.accuracy for point in points))


@dataclass(frozen=True)
class Accuracy:
    """The shares of correct answers to the records with a known label."""

    n: int
    """The number of records with a known label."""
    backbone: float
    served: float


@dataclass(frozen=True)
class Setting:
    """The figures of exits with thresholds on the records of a part."""

    thresholds: tuple[float, ...]
    cost: float
    """The mean cost of a request as a fraction of the backbone's, heads included, in the measure of the plan."""
    flops: float
    """The mean FLOPs of a request as a fraction of the backbone's, heads included."""
    disagreement: float
    """The share of records whose answer is not the backbone's."""
    loss: float
    """The mean loss under the risk of the run."""
    accuracy: Accuracy | None
    """The accuracy; None if no record has a label."""


def setting(point: OperatingPoint, predictions: PartPredictions, flops: Costs) -> Setting:
    """Return the figures of an operating point on the records of a part; `flops` are the candidates' costs in FLOPs."""
    simulated = outcome(point, predictions.candidates)
    accuracy, known = None, predictions.labels >= 0
    if bool(known.any()):
        served = served_classes(point, simulated.exit, predictions.answers, predictions.full)
        accuracy = Accuracy(int(known.sum()), _share((predictions.teacher == predictions.labels)[known]),
                            _share((served == predictions.labels)[known]))
    return Setting(point.thresholds, mean_cost(point, simulated.exit, predictions.candidates.costs),
                   mean_cost(point, simulated.exit, flops), _share(simulated.differs),
                   simulated.losses.double().mean().item(), accuracy)


def exit_performances(point: OperatingPoint, predictions: PartPredictions) -> Sequence[tuple[Performance, Performance]]:
    """Return the performance of each exit of an operating point: alone, and after the exits before it."""
    candidates, answers = predictions.candidates, predictions.answers
    taken = outcome(point, candidates).exit
    return [(performance(candidates.confidence[:, layer] >= threshold, answers[:, layer], predictions),
             performance(taken == position, answers[:, layer], predictions))
            for position, (layer, threshold) in enumerate(zip(point.layers, point.thresholds))]


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
