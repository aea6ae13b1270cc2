"""BranchyNet (Teerapittayanon et al. 2016) on a frozen backbone: labelled heads, exits by low entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.handler.inference.forward import Exit
from tests.benchmarks.baselines.labelled import LabelledRecords, most_aggressive


@dataclass(frozen=True)
class EntropyPolicy:
    """A request leaves if the entropy of the head's distribution, in nats, is at most a threshold."""

    threshold: float

    def __call__(self, logits: Tensor) -> Tensor:
        return entropy(logits) <= self.threshold


def entropy(logits: Tensor) -> Tensor:
    """Return the (B,) entropies, in nats, of softmax(logits)."""
    log_probabilities = logits.log_softmax(dim=1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1)


def branchynet(records: LabelledRecords, max_loss: float) -> dict[str, Exit]:
    """Return exits with a common entropy threshold whose loss in accuracy on the tune rows is at most `max_loss`."""
    tune = records.tune
    logits = records.logits(tune)
    answers, spread = [one.argmax(dim=1) for one in logits], [entropy(one) for one in logits]
    levels = torch.logspace(-5, 0, 120, dtype=torch.float64).mul(math.log(records.n_classes)).tolist()
    threshold = most_aggressive(levels, lambda level: records.loss(answers, [one <= level for one in spread], tune),
                                max_loss)
    if threshold is None:
        return {}
    return {path: Exit(head, EntropyPolicy(threshold), lambda scores: scores)
            for (path, head), one in zip(records.heads.items(), spread) if bool((one <= threshold).any())}
