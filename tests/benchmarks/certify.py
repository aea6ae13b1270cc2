"""How often the rules for thresholds break their promise: on random splits of real records.

    python -m tests.benchmarks.certify --json FILE

Heads are trained once on a quarter of the CIFAR-10 requests. The others are split at random, again and again:
every rule chooses its exits with 2,500 of them (the certified one uses 1,000 to choose and 1,500 to prove), and
breaks its budget when more than the tolerated share of the remaining 5,000 is answered differently.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.head import HeadSpec
from early_exit.handler.policy import ConfidencePolicy
from early_exit.handler.served import ServedModel
from early_exit.training.calibrate import fit_temperature
from early_exit.training.certify import p_value, walk
from early_exit.training.cost import Costs, flop_costs, head_flops
from early_exit.training.distill import Distillation, train_head
from early_exit.training.thresholds import (
    NEVER,
    Candidates,
    Choice,
    certified_path,
    equal_choice,
    mean_cost,
    outcome,
    paper_choice,
)
from tests.benchmarks.subjects import Subject, resnet18
from tests.support.cifar import DataMissing, as_batch, load_requests

N_TRAIN, N_TUNE, N_CERTIFY = 2500, 1000, 1500
DELTA = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description="How often the rules for thresholds break their promise.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--splits", type=int, default=200)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            heads = Heads.train(resnet18(Path(scratch)))
    except DataMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    rows = [summary for tolerance in (0.01, 0.02) for summary in broken(heads, tolerance, options.splits)]
    figures: dict[str, Any] = {f"{rule}_broken_share": max(one["broken_share"] for one in rows if one["rule"] == rule)
                               for rule in RULES}
    figures |= {"n": options.splits, "rows": rows}
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0


class Heads:
    """What trained heads say about records that they were not trained on."""

    def __init__(self, logits: Tensor, backbone_class: Tensor, costs: Costs) -> None:
        self.logits, self.backbone_class, self.costs = logits, backbone_class, costs  # (N, L, K), (N,)

    @classmethod
    def train(cls, subject: Subject) -> Heads:
        """Train the default head of each layer on the first requests."""
        backbone = subject.backbone
        inputs = as_batch(load_requests()[0])
        layers = backbone.description.candidates
        model = ServedModel(backbone, sampling_rate=1.0, record_layers=len(layers), record_pool=4)
        with torch.no_grad():
            for batch in inputs.split(250):
                model(batch)
        served = model.take_served()
        scores = torch.cat([one.answers.reference for one in served])
        logits, flops = [], []
        for layer in layers:
            recorded = torch.cat([one.activations[layer.path] for one in served])
            head = train_head(HeadSpec(), layer.shape, recorded[:N_TRAIN], scores[:N_TRAIN].log_softmax(dim=1),
                              Distillation())
            logits.append(head.classify(recorded[N_TRAIN:].float()))
            flops.append(head_flops(head, layer.shape) / backbone.description.flops)
        return cls(torch.stack(logits, dim=1), scores[N_TRAIN:].argmax(dim=1), flop_costs(layers, flops))

    def calibrated(self, tune: Tensor, *others: Tensor) -> list[Candidates]:
        """Fit the temperatures on some rows; return what the heads say about these and about others."""
        n_layers = self.logits.shape[1]
        temperatures = [fit_temperature(self.logits[tune, layer], self.backbone_class[tune])
                        for layer in range(n_layers)]
        found = []
        for rows in (tune, *others):
            confidence = torch.stack([ConfidencePolicy(temperatures[layer], NEVER).confidence(self.logits[rows, layer])
                                      for layer in range(n_layers)], dim=1)
            agrees = self.logits[rows].argmax(dim=2) == self.backbone_class[rows][:, None]
            found.append(Candidates(confidence, agrees, (~agrees).float(), self.costs))
        return found


def certified(heads: Heads, rows: Tensor, test: Tensor, tolerance: float) -> tuple[Choice, Candidates]:
    tune, certify, unseen = heads.calibrated(rows[:N_TUNE], rows[N_TUNE:], test)
    path = certified_path(tune, tolerance, DELTA, len(certify))
    p_values = (p_value(int(outcome(choice, certify).differs.sum()), len(certify), tolerance) for choice in path)
    return path[walk(p_values, DELTA)], unseen


def paper(heads: Heads, rows: Tensor, test: Tensor, tolerance: float) -> tuple[Choice, Candidates]:
    tune, unseen = heads.calibrated(rows, test)
    return paper_choice(tune, tolerance), unseen


def equal(heads: Heads, rows: Tensor, test: Tensor, tolerance: float) -> tuple[Choice, Candidates]:
    tune, unseen = heads.calibrated(rows, test)
    return equal_choice(tune, tolerance), unseen


RULES: dict[str, Callable[[Heads, Tensor, Tensor, float], tuple[Choice, Candidates]]] = {
    "certified": certified, "paper": paper, "equal": equal}


def broken(heads: Heads, tolerance: float, n_splits: int) -> list[dict[str, Any]]:
    """Return for each rule how often it broke its budget, and what it cost."""
    differs, costs = defaultdict(list), defaultdict(list)
    for seed in range(n_splits):
        order = torch.randperm(len(heads.backbone_class), generator=torch.Generator().manual_seed(seed))
        rows, test = order[:N_TUNE + N_CERTIFY], order[N_TUNE + N_CERTIFY:]
        for name, rule in RULES.items():
            choice, unseen = rule(heads, rows, test, tolerance)
            found = outcome(choice, unseen)
            differs[name].append(found.differs.double().mean().item())
            costs[name].append(mean_cost(choice, found.exit, heads.costs))
    return [{"rule": name, "tolerance": tolerance,
             "broken_share": sum(one > tolerance for one in differs[name]) / n_splits,
             "mean_disagreement": sum(differs[name]) / n_splits, "worst_disagreement": max(differs[name]),
             "mean_flops_ratio": sum(costs[name]) / n_splits} for name in RULES]


if __name__ == "__main__":
    sys.exit(main())
