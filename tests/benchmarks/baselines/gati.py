"""Gati (Balasubramanian et al. 2021): each layer has a predictor of the class, and a selector that trusts it or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from early_exit.handler.inference.forward import Exit
from tests.benchmarks.baselines.labelled import LabelledRecords, most_aggressive

_STEPS = 400


class Selector(nn.Module):
    """An exit policy that tells from a predictor's (B, K) logits whether the predicted class can be trusted."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_classes, 32), nn.ReLU(), nn.Linear(32, 1))
        self.threshold = 2.0

    def trust(self, logits: Tensor) -> Tensor:
        """Return the (B,) probabilities that the predictor is right."""
        ranked = logits.softmax(dim=1).sort(dim=1, descending=True).values
        trust: Tensor = self.layers(ranked).squeeze(1).sigmoid()
        return trust

    def forward(self, logits: Tensor) -> Tensor:
        return self.trust(logits) >= self.threshold


def gati(records: LabelledRecords, max_loss: float) -> dict[str, Exit]:
    """Return exits whose selectors have a common threshold with a loss in accuracy of at most `max_loss`.

    Selectors are trained on half of the tune rows, since predictors are too sure of the rows they were trained on.
    The threshold is chosen on the other half.
    """
    learn, choose = records.tune[::2], records.tune[1::2]
    selectors, answers, trusts = [], [], []
    for logits in records.logits(learn):
        selectors.append(_train(Selector(records.n_classes), logits, logits.argmax(dim=1) == records.labels[learn]))
    for selector, logits in zip(selectors, records.logits(choose)):
        answers.append(logits.argmax(dim=1))
        trusts.append(selector.trust(logits))
    levels = (1 - torch.logspace(-4, 0, 120, dtype=torch.float64)).tolist()
    threshold = most_aggressive(levels, lambda level: records.loss(answers, [one >= level for one in trusts], choose),
                                max_loss)
    exits: dict[str, Exit] = {}
    for (path, head), selector, trust in zip(records.heads.items(), selectors, trusts):
        if threshold is not None and bool((trust >= threshold).any()):
            selector.threshold = threshold
            exits[path] = Exit(head, selector, lambda scores: scores)
    return exits


def _train(selector: Selector, logits: Tensor, right: Tensor) -> Selector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in selector.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.AdamW(selector.parameters(), lr=1e-2)
        for _ in range(_STEPS):
            loss = functional.binary_cross_entropy(selector.trust(logits), right.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return selector.eval().requires_grad_(False)
