"""The anytime mode of the paper: a request is answered as usual and hears what every exit would have said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.backbone.scores import ScoreKind
from early_exit.handler.protocol import ANYTIME_HEADER


def who_asks(context: Any, n_items: int) -> list[bool]:
    """Return for each request of a call whether its headers ask for the opinions, however a proxy spells them."""
    return [any(name.lower() == ANYTIME_HEADER.lower() for name in context.get_all_request_header(item))
            for item in range(n_items)]


def opinions_headers(exits: Sequence[str], scores: Sequence[Tensor], kind: ScoreKind, labels: Any) -> list[str]:
    """Return the headers of the requests that asked.

    Args:
        exits: names of the exits, in order.
        scores: for each of them the (A, K) scores of the A requests.
        kind: of the scores.
        labels: the handler's `mapping` from class numbers, as strings, to names; anything else is left out.
    """
    by_request = torch.stack(list(scores), dim=1).float().flatten(0, 1)  # (A * exits, K)
    confidences, classes = kind.log_probabilities(by_request).exp().max(dim=1)
    told = [{"exit": name, "class": number, **_label(labels, number), "confidence": round(confidence, 4)}
            for name, number, confidence in zip(list(exits) * len(scores[0]), classes.tolist(), confidences.tolist())]
    return [json.dumps(told[start:start + len(exits)], separators=(",", ":"))
            for start in range(0, len(told), len(exits))]


def _label(labels: Any, number: int) -> dict[str, str]:
    found = labels.get(str(number)) if isinstance(labels, Mapping) else None
    if isinstance(found, (list, tuple)) and found:  # such as ["n01440764", "tench"]
        found = found[-1]
    return {"label": found} if isinstance(found, str) else {}
