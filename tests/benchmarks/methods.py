"""How exits are chosen: by us, by the paper's rules, and by the baselines, all from the same records.

A budget is fixed before anything is measured. It is what a certified method promises, what the paper's rules are given,
and what accuracy the baselines may lose. Layers are counted in the same way for all methods: a method is offered a
number of candidate layers, spread over the backbone's cost. The heads of all methods are optimized for serving in the
same way, and batches shrink for all methods where that pays on this machine. No method knows the measured requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.exits.risk import Risk
from early_exit.handler.inference.forward import Exit
from early_exit.training.data.labels import load_labels
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.options import TrainingOptions
from early_exit.training.planning.choose import choose, make_plan
from early_exit.training.planning.exit_costs import exit_costs
from early_exit.training.planning.predictions import PartPredictions, predict
from tests.benchmarks.baselines.branchynet import branchynet
from tests.benchmarks.baselines.earlyon import earlyon
from tests.benchmarks.baselines.gati import gati
from tests.benchmarks.baselines.labelled import LabelledRecords
from tests.benchmarks.bench import BATCH, Bench

BUDGETS = (0.005, 0.01, 0.02)
LAYER_COUNTS = (4, 8, None)
"""The numbers of layers that are offered to methods that do not decide themselves which layers pay; None stands for all
candidate layers."""
ALL = (None,)


@dataclass(frozen=True)
class Terms:
    """What a method is given for a row."""

    budget: float
    layers: int | None
    """The number of layers that are offered; None stands for all candidate layers."""


@dataclass(frozen=True)
class Choice:
    """What a method chose for a row."""

    exits: Mapping[str, Exit]
    """The exits, with heads as they were trained. Keys are layer paths."""
    about: Mapping[str, Any]
    """More columns of the row."""


@dataclass(frozen=True)
class Method:
    """A way to choose exits, and the rows that it has in the table."""

    choose: Callable[[Bench, Terms], Choice]
    counts: Sequence[int | None] = ALL
    """The numbers of layers that it has rows for; None stands for all candidate layers."""
    every_budget: bool = False
    """Whether it has a row for each budget, and not only for the largest."""
    papers_loss: bool = False
    """Whether its budget is, instead, the accuracy that the paper lost on this network."""

    def terms(self, bench: Bench, budgets: Sequence[float]) -> Iterator[Terms]:
        """Yield the terms of each row: none if the budget is the paper's loss, and the paper lacks this network."""
        if self.papers_loss:
            budgets = [] if bench.subject.published is None else [bench.subject.published.accuracy_loss]
        n_candidates = len(bench.layers(None))
        counts = dict.fromkeys(None if count is None or count >= n_candidates else count for count in self.counts)
        for budget in budgets if self.every_budget or self.papers_loss else [max(budgets)]:
            for count in counts:
                yield Terms(budget, count)


def ours(bench: Bench, terms: Terms, *, heads: str = "searched", **changes: Any) -> Choice:
    """Return the exits that one of our rules or of the paper's rules chooses among our heads.

    Args:
        bench: the records and the heads.
        terms: the terms of the row.
        heads: `searched`, `default` (the default architecture) or `plain` (the same without replay).
        changes: changes of the options.
    """
    options = replace(bench.options, tolerance=terms.budget, **changes)
    layers = bench.layers(terms.layers)
    trained: list[TrainedHead] = [one for one in getattr(bench, heads) if one.layer in layers]
    plan = _plan(bench, heads, trained, options) if trained else None  # None if no head is better than chance
    by_path = {one.layer.path: one.head for one in trained}
    exits = {planned.layer: Exit(by_path[planned.layer], planned.policy, planned.policy.answers)
             for planned in (plan.exits if plan else ())}
    certificate = plan.certificate if plan else None
    return Choice(bench.shrinking(exits, options.batch_size), {
        "tolerance": terms.budget, "risk": options.risk.value, "labelled": options.risk is Risk.ACCURACY,
        "heads": heads, "layers": len(layers), "replayed": heads != "plain" and bench.subject.replay is not None,
        "certificate": None if certificate is None else certificate.in_words()})


def _plan(bench: Bench, heads: str, trained: Sequence[TrainedHead], options: TrainingOptions) -> ExitPlan:
    training_set = bench.recorded if heads == "plain" else bench.replayed
    labels = None
    if options.risk is Risk.ACCURACY:
        labels = load_labels(bench.subject.labels, training_set.request, training_set.row, training_set.n_classes)
    description, profile = bench.subject.backbone.description, None if options.measure == "flops" else bench.profile
    costs = exit_costs(profile, trained, [options.policy] * len(trained), description, options.batch_size)
    predictions = predict(training_set, trained, costs, options.risk, options.policy, labels)
    if options.thresholds != "certified":  # it certifies nothing, so it chooses with all that others have for both
        predictions = replace(predictions, tune=joined(predictions.tune, predictions.certify))
    point = choose(predictions, options)
    return make_plan(point, predictions, trained, training_set, description, options, profile)


def joined(one: PartPredictions, other: PartPredictions) -> PartPredictions:
    """Return the predictions for the records of one part and of another."""
    def in_one(first: Any, second: Any) -> dict[str, Tensor]:
        return {field.name: torch.cat([getattr(first, field.name), getattr(second, field.name)])
                for field in fields(first) if isinstance(getattr(first, field.name), Tensor)}

    return replace(one, candidates=replace(one.candidates, **in_one(one.candidates, other.candidates)),
                   **in_one(one, other))


def theirs(bench: Bench, terms: Terms, *, baseline: Callable[[LabelledRecords, float], dict[str, Exit]]) -> Choice:
    """Return the exits that a baseline chooses. Baselines get labels."""
    layers = bench.layers(terms.layers)
    exits = baseline(bench.labelled.of_layers(layers), terms.budget)
    return Choice(bench.shrinking(exits, BATCH), {
        "tolerance": terms.budget, "risk": "accuracy", "labelled": True, "heads": baseline.__name__,
        "layers": len(layers), "replayed": bench.of_one_class is not bench.recorded, "certificate": None})


_PAPER = {"thresholds": "paper", "measure": "flops"}
METHODS: dict[str, Method] = {
    "certified": Method(ours, every_budget=True),
    "certified-papers-loss": Method(partial(ours, risk=Risk.ACCURACY), papers_loss=True),
    "certified-accuracy": Method(partial(ours, risk=Risk.ACCURACY), every_budget=True),
    "certified-confidence-gap": Method(partial(ours, risk=Risk.CONFIDENCE_GAP)),
    "certified-batch-8": Method(partial(ours, batch_size=8)),
    "certified-batch-1": Method(partial(ours, batch_size=1)),
    "certified-flops": Method(partial(ours, measure="flops")),
    "no-nas": Method(partial(ours, heads="default")),
    "no-replay": Method(partial(ours, heads="plain")),
    "no-replay-papers-loss": Method(partial(ours, heads="plain", risk=Risk.ACCURACY), papers_loss=True),
    "paper": Method(partial(ours, **_PAPER), LAYER_COUNTS, every_budget=True),
    "paper-no-nas": Method(partial(ours, heads="default", **_PAPER), LAYER_COUNTS, every_budget=True),
    "equal": Method(partial(ours, thresholds="equal", measure="flops"), LAYER_COUNTS, every_budget=True),
    "branchynet": Method(partial(theirs, baseline=branchynet), LAYER_COUNTS, every_budget=True),
    "gati": Method(partial(theirs, baseline=gati), LAYER_COUNTS, every_budget=True),
    "earlyon": Method(partial(theirs, baseline=earlyon), LAYER_COUNTS, every_budget=True),
}
