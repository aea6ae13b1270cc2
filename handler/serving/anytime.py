"""The anytime mode of the paper: a request is answered as usual and is told what every exit would have said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind


def per_exit_predictions(exits: Sequence[str], scores: Sequence[Tensor], kind: ScoreKind, labels: Any) -> list[str]:
    """Return what each request that asked is told: JSON, some 60 bytes an exit.

    A list of {"exit", "class", "confidence"} in the order of the backbone, the whole backbone last, with "label" where
    the handler has names for the classes.

    Args:
        exits: names of the exits, in order.
        scores: for each exit the (A, K) scores of the A requests.
        kind: of the scores.
        labels: the handler's `mapping` from class numbers, as strings, to names; anything else is left out.
    """
    by_request = torch.stack(list(scores), dim=1).float().flatten(0, 1)  # (A * exits, K)
    confidences, classes = kind.log_probabilities(by_request).exp().max(dim=1)
    predictions = [
        {"exit": name, "class": number, **_label(labels, number), "confidence": round(confidence, 4)}
        for name, number, confidence in zip(list(exits) * len(scores[0]), classes.tolist(), confidences.tolist())]
    return [json.dumps(predictions[start:start + len(exits)], separators=(",", ":"))
            for start in range(0, len(predictions), len(exits))]


def _label(labels: Any, number: int) -> dict[str, str]:
    label = labels.get(str(number)) if isinstance(labels, Mapping) else None
    if isinstance(label, (list, tuple)) and label:  # such as ["n01440764", "tench"]
        label = label[-1]
    return {"label": label} if isinstance(label, str) else {}
