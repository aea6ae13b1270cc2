"""How exits answer: hits, agreement, accuracy and the categories of Table 1; at one threshold, at all, on a path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from early_exit.training.costs.cost import Costs
from early_exit.training.planning.predictions import PartPredictions
from early_exit.training.selection.thresholds import OperatingPoint, mean_cost, outcome, served_classes

CURVE_THRESHOLDS = tuple(step / 100 for step in range(101))


@dataclass(frozen=True)
class Categories:
    """How many answers with a known label fall in each category of Table 1: B is the backbone's class, C the exit's."""

    both_right: int
    """BC."""
    same_mistake: int
    """Not (BC): both say the same, which is wrong."""
    only_backbone: int
    """B and not C: what the exit costs in accuracy."""
    only_exit: int
    """C and not B: what it gains."""
    other_mistake: int
    """Neither: they say different things, both wrong."""

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
    """How an exit answers those of N records that leave at it (Tables 1 and 2)."""

    hit_rate: float
    """Share of the records that leave here."""
    agreement: float | None
    """Share of those that are answered like the backbone; none when nobody leaves."""
    accuracy: float | None
    """Share of those with a known label that are answered right; none when there are none."""
    effect: float | None
    """F(theta), equation 2: change of the accuracy on all labelled records that these answers make."""
    bound: float
    """Hit rate x (1 - agreement), equation 3: the accuracy cannot fall by more."""
    categories: Categories | None
    """None without labels."""


def performance(leaves: Tensor, answers: Tensor, said: PartPredictions) -> Performance:
    """Return how those records are answered that leave.

    Args:
        leaves: (N,) bool.
        answers: (N,) int64 classes of the exit.
        said: of the part with the N records.
    """
    n_hits, n_known = int(leaves.sum()), int((said.labels >= 0).sum())
    n_agree = int((answers == said.teacher)[leaves].sum())
    found = categorize(answers[leaves], said.teacher[leaves], said.labels[leaves])
    return Performance(
        hit_rate=n_hits / len(said), agreement=n_agree / n_hits if n_hits else None,
        accuracy=(found.both_right + found.only_exit) / found.total if found.total else None,
        effect=(found.only_exit - found.only_backbone) / n_known if n_known else None,
        bound=(n_hits - n_agree) / len(said), categories=found if n_known else None)


@dataclass(frozen=True)
class Curve:
    """One head alone at every threshold (Figure 2); an entry is none where nobody leaves."""

    layer: str
    thresholds: tuple[float, ...]
    hit_rate: tuple[float, ...]
    agreement: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


def curve(layer: str, index: int, said: PartPredictions) -> Curve:
    """Return the curve of the candidate with an index, on the records of a part."""
    at = [performance(said.candidates.confidence[:, index] >= threshold, said.answers[:, index], said)
          for threshold in CURVE_THRESHOLDS]
    return Curve(layer, CURVE_THRESHOLDS, tuple(one.hit_rate for one in at), tuple(one.agreement for one in at),
                 tuple(one.accuracy for one in at))


@dataclass(frozen=True)
class Accuracy:
    """On the records with a known label."""

    n: int
    backbone: float
    served: float


@dataclass(frozen=True)
class Setting:
    """What exits with thresholds do to the records of a part."""

    thresholds: tuple[float, ...]
    cost: float
    """Mean cost of a request as a fraction of the backbone's, in the measure of the plan."""
    flops: float
    """The same in FLOPs."""
    disagreement: float
    loss: float
    """Mean loss under the risk of the run."""
    accuracy: Accuracy | None
    """None without labels."""


def setting(choice: OperatingPoint, said: PartPredictions, flops: Costs) -> Setting:
    """Return what a choice does to the records of a part; `flops` are the candidates' costs in FLOPs."""
    found = outcome(choice, said.candidates)
    accuracy, known = None, said.labels >= 0
    if bool(known.any()):
        served = served_classes(choice, found.exit, said.answers, said.full)
        accuracy = Accuracy(int(known.sum()), _share((said.teacher == said.labels)[known]),
                            _share((served == said.labels)[known]))
    return Setting(choice.thresholds, mean_cost(choice, found.exit, said.candidates.costs),
                   mean_cost(choice, found.exit, flops), _share(found.differs), found.losses.double().mean().item(),
                   accuracy)


def exit_performances(choice: OperatingPoint, said: PartPredictions) -> Sequence[tuple[Performance, Performance]]:
    """Return how each exit of a choice does alone, and after the exits before it."""
    taken = outcome(choice, said.candidates).exit
    return [(performance(said.candidates.confidence[:, layer] >= threshold, said.answers[:, layer], said),
             performance(taken == position, said.answers[:, layer], said))
            for position, (layer, threshold) in enumerate(zip(choice.layers, choice.thresholds))]


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
