"""Random predictions that heads might make for records."""

from __future__ import annotations

import torch

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.exits.policy import NEVER, ConfidencePolicy
from early_exit.handler.exits.risk import Risk
from early_exit.training.costs.cost import flop_costs
from early_exit.training.planning.predictions import HeadPredictions, PartPredictions
from early_exit.training.selection.evidence import Evidence
from early_exit.training.selection.simulation import Candidates

N_CLASSES = 4


def made_predictions(n_records: int = 200, n_layers: int = 3, *, labelled: float = 1.0,
                     seed: int = 0) -> HeadPredictions:
    """Return predictions in which heads agree more often when they are confident. A share of the records has labels."""
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(f"layer{number}" for number in range(n_layers))
    costs = flop_costs([CandidateLayer(path, path, (8,), (number + 1) / (n_layers + 1))
                        for number, path in enumerate(layers)], [0.01] * n_layers)

    def drawn() -> PartPredictions:
        confidence = torch.rand(n_records, n_layers, generator=generator)
        teacher = torch.randint(N_CLASSES, (n_records,), generator=generator)
        guess = torch.randint(N_CLASSES, (n_records, n_layers), generator=generator)
        sure = torch.rand(n_records, n_layers, generator=generator) < confidence
        answers = torch.where(sure, teacher[:, None], guess)
        labels = torch.where(torch.rand(n_records, generator=generator) < 0.7, teacher, guess[:, 0])
        labels[torch.rand(n_records, generator=generator) >= labelled] = -1
        losses = Risk.DISAGREEMENT.losses(answers, teacher, torch.zeros(n_records, N_CLASSES))
        candidates = Candidates(confidence, 1 - confidence, answers == teacher[:, None], losses,
                                torch.ones(n_records, dtype=torch.bool), torch.zeros(n_records), costs)
        return PartPredictions(candidates, answers, teacher, teacher.clone(), labels)

    policies = tuple(ConfidencePolicy(1.0 + number, NEVER) for number in range(n_layers))
    return HeadPredictions(layers, policies, drawn(), drawn(), Evidence.of_independent(n_records))
