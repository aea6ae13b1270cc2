"""From judged heads to a plan: choose exits and thresholds on *tune*, prove them on *certify*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from early_exit.handler.backbone import BackboneDescription
from early_exit.handler.plan import Certificate, ExitPlan, PlannedExit
from early_exit.training.certify import METHODS, risk_p_value, walk
from early_exit.training.cost import head_flops
from early_exit.training.heads import TrainedHead
from early_exit.training.judged import Judged
from early_exit.training.material import Material
from early_exit.training.options import TrainingOptions
from early_exit.training.thresholds import (
    Candidates,
    Choice,
    batch_costs,
    certified_path,
    equal_choice,
    mean_cost,
    outcome,
    paper_choice,
    safer_settings,
)


def choose(judged: Judged, options: TrainingOptions) -> Choice:
    """Return the exits and thresholds; none where they would not pay."""
    tune, certify = judged.tune, judged.certify
    if options.thresholds == "paper":
        return paper_choice(tune, options.tolerance)
    if options.thresholds == "equal":
        return equal_choice(tune, options.tolerance)
    path = certified_path(tune, options.tolerance, options.delta, len(certify))
    p_values = (risk_p_value(options.risk, outcome(choice, certify).losses, options.tolerance, options.delta)
                for choice in path)
    index = walk(p_values, options.delta)
    if not pays(path[index], tune):
        return Choice((), ())
    return replace(path[index], safer=safer_settings(path, index, tune))


def pays(choice: Choice, tune: Candidates) -> bool:
    """Tell whether exits cost less than the plain backbone, by more than the draw of the batches could feign."""
    drawn = batch_costs(choice, outcome(choice, tune).exit, tune.costs)
    return bool(drawn.mean() + 1.645 * drawn.std() / len(drawn) ** 0.5 < 1)


def make_plan(choice: Choice, judged: Judged, heads: Sequence[TrainedHead], material: Material,
              backbone: BackboneDescription, options: TrainingOptions) -> ExitPlan:
    """Write a choice down, with its certificate."""
    exits = tuple(
        PlannedExit(layer=heads[index].layer.path, head=heads[index].head.spec, threshold=threshold,
                    temperature=judged.temperatures[index], cost=heads[index].layer.cost,
                    head_cost=head_flops(heads[index].head, heads[index].layer.shape) / backbone.flops)
        for index, threshold in zip(choice.layers, choice.thresholds))
    found = outcome(choice, judged.certify)
    certificate = None
    if options.thresholds == "certified":
        certificate = Certificate(
            risk=options.risk.value, tolerance=options.tolerance, confidence=options.confidence,
            n=len(judged.certify), k=int(found.differs.sum()), observed=found.losses.double().mean().item(),
            p_value=risk_p_value(options.risk, found.losses, options.tolerance, options.delta),
            method=METHODS[options.risk], window=(material.time.min().item(), material.time.max().item()))
    costs = judged.certify.costs
    return ExitPlan(backbone.sha256, options.thresholds, exits, certificate, measure=costs.measure,
                    batch_size=costs.batch_size, expected_cost=mean_cost(choice, found.exit, costs),
                    safer=choice.safer)
