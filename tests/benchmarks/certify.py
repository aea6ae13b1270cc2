"""How often the rules for thresholds break their promise: on random splits of real records.

    python -m tests.benchmarks.certify --json FILE

Heads are trained once on a quarter of the CIFAR-10 requests. The others are split at random, again and again: every
rule chooses its exits with 2,500 of them, ours by the very function that ee-train calls; the certified one uses 1,000
to choose and 1,500 to prove. A rule breaks its budget when more than the tolerated share of all 6,500 requests that
could have been drawn for the proof are answered differently: these are what the certificate speaks of. The 5,000 that
no rule has seen are a sample of them; how often more than the tolerated share of this sample differs is told too, luck
of the draw included. earlyon's rule promises something else, from labels: it breaks its budget when it loses more
accuracy than that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from early_exit.handler.exits.head import HeadSpec
from early_exit.handler.exits.policy import NEVER, ConfidencePolicy, PlannedPolicy
from early_exit.handler.model.loading import build_model
from early_exit.training.costs.cost import Costs, flop_costs, head_flops
from early_exit.training.costs.profiling import one_thread
from early_exit.training.heads.distill import Distillation, train_head
from early_exit.training.options import Rule, TrainingOptions
from early_exit.training.planning.choose import choose
from early_exit.training.planning.predictions import HeadPredictions, PartPredictions
from early_exit.training.selection.calibrate import fit_policy
from early_exit.training.selection.simulation import Candidates, OperatingPoint, mean_cost, outcome, served_classes
from tests.benchmarks.baselines.earlyon import earlyon_thresholds
from tests.benchmarks.report import report
from tests.benchmarks.subjects import Subject, resnet18
from tests.support.cifar import as_batch, load_requests

N_TRAIN, N_TUNE, N_CERTIFY = 2500, 1000, 1500


def main() -> int:
    parser = argparse.ArgumentParser(description="How often the rules for thresholds break their promise.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--splits", type=int, default=200)
    options = parser.parse_args()
    return report(options.json, lambda scratch: measure(Heads.train(resnet18(scratch)), options.splits))


def measure(heads: Heads, n_splits: int) -> dict[str, Any]:
    """Return how often each rule breaks the budgets of 1 and 2 %."""
    with one_thread():  # the tensors are small
        rows = [summary for tolerance in (0.01, 0.02) for summary in broken(heads, tolerance, n_splits)]
    worst = {f"{rule}_{share}": max(one[share] for one in rows if one["rule"] == rule)
             for share in ("broken_share", "broken_share_unseen") for rule in RULES}
    return {**worst, "n": n_splits, "rows": rows}


class Heads:
    """What trained heads say about records that they were not trained on."""

    def __init__(self, logits: Tensor, scores: Tensor, labels: Tensor, costs: Costs) -> None:
        self.logits, self.scores, self.labels, self.costs = logits, scores, labels, costs  # (N, L, K), (N, K), (N,)
        self.backbone_class = scores.argmax(dim=1)

    @classmethod
    def train(cls, subject: Subject) -> Heads:
        """Train the default head of each layer on the first requests."""
        backbone = subject.backbone
        bodies, labels = load_requests()
        inputs = as_batch(bodies)
        layers = backbone.description.candidates
        model = build_model(backbone, sampling_rate=1.0, record_layers=len(layers), record_pool=4)
        with torch.no_grad():
            for batch in inputs.split(250):
                model(batch)
        served = model.log.take()
        scores = torch.cat([one.answers.reference for one in served])
        logits, flops = [], []
        for layer in layers:
            recorded = torch.cat([one.activations[layer.path] for one in served])
            head = train_head(HeadSpec(), layer.shape, recorded[:N_TRAIN], scores[:N_TRAIN].log_softmax(dim=1),
                              Distillation())
            logits.append(head.classify(recorded[N_TRAIN:].float()))
            flops.append(head_flops(head, layer.shape) / backbone.description.flops)
        return cls(torch.stack(logits, dim=1), scores[N_TRAIN:], torch.tensor(labels[N_TRAIN:]),
                   flop_costs(layers, flops))

    def predictions(self, tune: Tensor, certify: Tensor) -> HeadPredictions:
        """Fit the policies on some rows; return what the heads predict for these and for others."""
        policies = tuple(fit_policy(ConfidencePolicy.kind, self.logits[tune, layer], self.backbone_class[tune])
                         for layer in range(self.costs.n_layers))
        parts = (PartPredictions(self.candidates(rows, policies), self.logits[rows].argmax(dim=2),
                                 self.backbone_class[rows], self.backbone_class[rows], self.labels[rows])
                 for rows in (tune, certify))
        return HeadPredictions(tuple(map(str, range(self.costs.n_layers))), policies, *parts)

    def candidates(self, rows: Tensor, policies: Sequence[PlannedPolicy]) -> Candidates:
        """Return what heads with these policies predict for some rows."""
        confidence, error_chance = (
            torch.stack([says(self.logits[rows, layer]) for layer, says in enumerate(by_head)], dim=1)
            for by_head in ([policy.confidence for policy in policies], [policy.error_chance for policy in policies]))
        agrees = self.logits[rows].argmax(dim=2) == self.backbone_class[rows][:, None]
        return Candidates(confidence, error_chance, agrees, (~agrees).float(), torch.ones(len(rows), dtype=torch.bool),
                          torch.zeros(len(rows)), self.costs)

    def accuracy_loss(self, point: OperatingPoint, rows: Tensor, exit_taken: Tensor) -> float:
        """Return the accuracy that an operating point loses on some rows.

        Args:
            point: exits.
            rows: (M,) rows.
            exit_taken: (M,) position of the exit that each takes, or -1.
        """
        backbone, labels = self.backbone_class[rows], self.labels[rows]
        served = served_classes(point, exit_taken, self.logits[rows].argmax(dim=2), backbone)
        return ((backbone == labels).double().mean() - (served == labels).double().mean()).item()


def chosen(thresholds: Rule, heads: Heads, rows: Tensor, test: Tensor,
           tolerance: float) -> tuple[OperatingPoint, Candidates]:
    """Choose by one of our rules, as ee-train does."""
    n_tune = N_TUNE if thresholds == "certified" else len(rows)
    predictions = heads.predictions(rows[:n_tune], rows[n_tune:])
    options = TrainingOptions(tolerance=tolerance, thresholds=thresholds, measure="flops")
    return choose(predictions, options), heads.candidates(test, predictions.policies)


def earlyon(heads: Heads, rows: Tensor, test: Tensor, tolerance: float) -> tuple[OperatingPoint, Candidates]:
    temperatures, thresholds = earlyon_thresholds(heads.logits[rows], heads.scores[rows], heads.labels[rows], tolerance)
    enabled = tuple(layer for layer, threshold in enumerate(thresholds) if threshold < NEVER)
    return (OperatingPoint(enabled, tuple(thresholds[layer] for layer in enabled)),
            heads.candidates(test, [ConfidencePolicy(temperature, NEVER) for temperature in temperatures]))


RULES: dict[str, Callable[[Heads, Tensor, Tensor, float], tuple[OperatingPoint, Candidates]]] = {
    "certified": partial(chosen, "certified"), "paper": partial(chosen, "paper"), "equal": partial(chosen, "equal"),
    "earlyon": earlyon}


def broken(heads: Heads, tolerance: float, n_splits: int) -> list[dict[str, Any]]:
    """Return for each rule how often it broke its budget, and what it cost."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in RULES}
    for seed in tqdm(range(n_splits), desc=f"splits at {tolerance:.0%}", disable=None):
        order = torch.randperm(len(heads.backbone_class), generator=torch.Generator().manual_seed(seed))
        rows, drawn_from = order[:N_TUNE + N_CERTIFY], order[N_TUNE:]
        for name, rule in RULES.items():
            point, records = rule(heads, rows, drawn_from, tolerance)
            after = outcome(point, records)
            unseen = slice(N_CERTIFY, None)
            found[name].append((
                after.differs.double().mean().item(), after.differs[unseen].double().mean().item(),
                heads.accuracy_loss(point, drawn_from, after.exit),
                heads.accuracy_loss(point, drawn_from[unseen], after.exit[unseen]),
                mean_cost(point, after.exit[unseen], heads.costs)))
    summaries = []
    for name, splits in found.items():
        everywhere, differs, lost_everywhere, losses, costs = zip(*splits)
        promised, unseen_promised = (lost_everywhere, losses) if name == "earlyon" else (everywhere, differs)
        summaries.append({
            "rule": name, "tolerance": tolerance,
            "promise": "accuracy loss" if name == "earlyon" else "disagreement",
            "broken_share": sum(one > tolerance for one in promised) / n_splits,
            "broken_share_unseen": sum(one > tolerance for one in unseen_promised) / n_splits,
            "mean_disagreement": fmean(differs), "worst_disagreement": max(differs),
            "mean_accuracy_loss": fmean(losses), "worst_accuracy_loss": max(losses), "mean_flops_ratio": fmean(costs)})
    return summaries


if __name__ == "__main__":
    sys.exit(main())
