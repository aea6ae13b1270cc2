"""What the paper reports about a plan beyond single numbers: its exits (Table 2), other thresholds (Figures 2 to 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Answers
from early_exit.handler.protocol import FULL
from early_exit.training.costs.cost import flop_costs
from early_exit.training.planning.predictions import PartPredictions
from early_exit.training.report.performance import Performance, curve, exit_performances, setting
from early_exit.training.selection.simulation import Candidates, OperatingPoint

_LEVELS = tuple(step / 20 for step in range(21))
_EVERY = 5
"""Every fifth threshold of a curve is kept. A curve's thresholds are a hundredth apart."""


def judgement(answers: Sequence[Answers], full: Tensor, truth: Tensor, layers: Sequence[CandidateLayer],
              heads: Sequence[float]) -> PartPredictions:
    """Return the predictions of a plan's exits for requests in anytime mode.

    Args:
        answers: the answers to M requests.
        full: the backbone's scores, (M, K).
        truth: the true classes, (M,).
        layers: the layers of the exits.
        heads: the FLOPs of each head as a fraction of the backbone's.
    """
    predictions = [torch.cat([one.exit_scores[stage] for one in answers]) for stage in (*range(len(layers)), FULL)]
    *opinions, served = predictions
    teacher, classes = full.argmax(dim=1), torch.stack([one.argmax(dim=1) for one in opinions], dim=1)
    confidence = torch.stack([ConfidencePolicy(1.0, 0.0).confidence(one) for one in opinions], dim=1)
    agrees, full_class = classes == teacher[:, None], served.argmax(dim=1)
    candidates = Candidates(confidence, 1 - confidence, agrees, (~agrees).float(), full_class == teacher,
                            (full_class != teacher).float(), flop_costs(layers, heads))
    return PartPredictions(candidates, classes, teacher, full_class, truth)


def tables(predictions: PartPredictions, layers: Sequence[CandidateLayer],
           thresholds: Sequence[float]) -> dict[str, Any]:
    """Return each exit's hit rate and accuracy, in the plan and alone at each threshold, and all at common thresholds.

    Args:
        predictions: the predictions for the measured requests.
        layers: the layers of the exits.
        thresholds: the confidence thresholds of the exits.
    """
    every = tuple(range(len(layers)))
    exits = []
    for index, (alone, together) in enumerate(exit_performances(OperatingPoint(every, tuple(thresholds)), predictions)):
        at = curve(layers[index].path, index, predictions)
        exits.append({
            "layer": layers[index].path, "threshold": _short(thresholds[index]), **_performance(together),
            "alone": _performance(alone),
            "at_thresholds": {"threshold": _column(at.thresholds[::_EVERY]), "hit_rate": _column(at.hit_rate[::_EVERY]),
                              "accuracy": _column(at.accuracy[::_EVERY])}})
    settings = [setting(OperatingPoint(every, (level,) * len(every)), predictions, predictions.candidates.costs)
                for level in _LEVELS]
    return {"exits": exits, "at_common_thresholds": {
        "threshold": _column(_LEVELS), "flops_ratio": _column([one.flops for one in settings]),
        "disagreement": _column([one.disagreement for one in settings]),
        "accuracy": _column([one.accuracy.served if one.accuracy else None for one in settings])}}


def _performance(found: Performance) -> Mapping[str, float | None]:
    return {"hit_rate": _short(found.hit_rate), "agreement": _short(found.agreement),
            "accuracy": _short(found.accuracy), "effect": _short(found.effect)}


def _column(values: Sequence[float | None]) -> list[float | None]:
    return [_short(value) for value in values]


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
