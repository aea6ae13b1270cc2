"""Simulates exits on records as in service: the exit that each record takes, its answer, and the cost of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from early_exit.training.costs.cost import Costs
from early_exit.training.selection.subset import Option, bit_mask, loss_masks

_N_BATCHES = 400


@dataclass(frozen=True)
class Candidates:
    """The outputs of L calibrated heads for N records."""

    confidence: Tensor
    """(N, L) confidences of the heads' policies, in [0, 1]."""
    error_chance: Tensor
    """(N, L) calibrated chances that the head's class is not the backbone's."""
    agrees: Tensor
    """(N, L) bool: the head's class is the backbone's."""
    losses: Tensor
    """(N, L) losses of the heads' answers under the risk of the run."""
    full_agrees: Tensor
    """(N,) bool: the answer without an exit, which an engine may change, has the backbone's class."""
    full_losses: Tensor
    """(N,) losses of the answers without an exit."""
    costs: Costs
    """The costs of the L candidates."""

    def __len__(self) -> int:
        return len(self.confidence)

    @property
    def n_layers(self) -> int:
        return self.confidence.shape[1]

    def option(self, layer: int, threshold: float) -> Option:
        """Return one candidate at one threshold, in the form that the search for a subset needs."""
        hits = self.confidence[:, layer] >= threshold
        return Option(bit_mask(hits), loss_masks((self.losses[:, layer] - self.full_losses) * hits))


@dataclass(frozen=True)
class OperatingPoint:
    """The candidates that become exits, and the confidence thresholds at which requests leave there."""

    layers: tuple[int, ...]
    """The indices of the chosen candidates, in order."""
    thresholds: tuple[float, ...]
    """The confidence threshold of each chosen candidate."""
    safer: tuple[tuple[float, ...], ...] = ()
    """The thresholds of the fallback levels, for the same exits, the nearest level first."""


@dataclass(frozen=True)
class Outcome:
    """The effect of an operating point on N records."""

    exit: Tensor
    """(N,) int64: position of the exit taken among those of the operating point, or -1 for none."""
    differs: Tensor
    """(N,) bool: the answer is not the backbone's."""
    losses: Tensor
    """(N,) float32: the loss of the answer under the risk of the run."""


def outcome(point: OperatingPoint, records: Candidates) -> Outcome:
    """Return the effect of an operating point on records; each record is answered by the first exit where it leaves."""
    n_records = len(records)
    exit_taken = torch.full((n_records,), -1, dtype=torch.int64)
    differs, losses = ~records.full_agrees, records.full_losses.clone()
    for position, (layer, threshold) in enumerate(zip(point.layers, point.thresholds)):
        leaves = (exit_taken == -1) & (records.confidence[:, layer] >= threshold)
        exit_taken[leaves] = position
        differs[leaves] = ~records.agrees[leaves, layer]
        losses[leaves] = records.losses[leaves, layer]
    return Outcome(exit_taken, differs, losses)


def served_classes(point: OperatingPoint, exit_taken: Tensor, answers: Tensor, full_class: Tensor) -> Tensor:
    """Return the (N,) int64 classes that an operating point answers with.

    Args:
        point: the exits.
        exit_taken: (N,) position of the exit that each record takes, or -1.
        answers: (N, L) int64 classes of the candidates.
        full_class: (N,) int64 classes for records that leave at no exit.
    """
    served = full_class.clone()
    for position, layer in enumerate(point.layers):
        leaves = exit_taken == position
        served[leaves] = answers[leaves, layer]
    return served


def batch_costs(point: OperatingPoint, exit_taken: Tensor, costs: Costs, *, seed: int = 0) -> Tensor:
    """Return the (400,) costs of full batches drawn from records with replacement; the backbone alone costs 1.

    Args:
        point: the exits.
        exit_taken: (N,) position of the exit that each record takes, or -1.
        costs: the costs of the candidates.
        seed: the seed of the draw.
    """
    drawn = torch.randint(len(exit_taken), (_N_BATCHES, costs.batch_size),
                          generator=torch.Generator().manual_seed(seed))
    exits = exit_taken[drawn]
    total = torch.zeros(_N_BATCHES, dtype=torch.float64)
    for position, (start, end) in enumerate(pairwise([-1, *point.layers, costs.n_layers])):
        n_alive = ((exits == -1) | (exits >= position)).sum(dim=1).numpy()
        total += torch.from_numpy(costs.stages[start + 1:end + 1].sum(axis=0)[n_alive])
        if end < costs.n_layers:
            total += torch.from_numpy(costs.exits[end][n_alive])
    return total


def mean_cost(point: OperatingPoint, exit_taken: Tensor, costs: Costs) -> float:
    """Return the expected cost of a request as a fraction of the backbone's, heads included.

    Args:
        point: the exits.
        exit_taken: (N,) position of the exit that each record takes, or -1.
        costs: the costs of the candidates.
    """
    total = 0.0
    for position, (start, end) in enumerate(pairwise([-1, *point.layers, costs.n_layers])):
        step = costs.at(((exit_taken == -1) | (exit_taken >= position)).double().mean().item())
        total += step.between(start, end) + (step.exits[end] if end < costs.n_layers else 0.0)
    return total
