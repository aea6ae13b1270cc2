"""From judged heads to a plan: choose exits and thresholds on *tune*, prove them on *certify*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.training.costs.cost import head_flops
from early_exit.training.costs.profiling import Profile
from early_exit.training.data.dataset import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.options import TrainingOptions
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.selection.certify import METHODS, risk_p_value, walk
from early_exit.training.selection.thresholds import (
    Candidates,
    OperatingPoint,
    batch_costs,
    certified_path,
    equal_point,
    mean_cost,
    outcome,
    paper_point,
    safer_settings,
)


def settings(judged: HeadPredictions, options: TrainingOptions) -> list[OperatingPoint]:
    """Return what a certified choice is made among, from "never exit" to aggressive."""
    tune = judged.tune
    expected = replace(tune, losses=options.risk.expected(tune.losses, tune.confidence))
    return certified_path(expected, options.tolerance, options.delta, len(judged.certify))


def choose(judged: HeadPredictions, options: TrainingOptions,
           path: Sequence[OperatingPoint] | None = None) -> OperatingPoint:
    """Return the exits and thresholds; none where they would not pay.

    Args:
        judged: what the heads say.
        options: what was asked for.
        path: what `settings` returned, where that is known already.
    """
    tune, certify = judged.tune, judged.certify
    if options.thresholds == "paper":
        return paper_point(tune, options.tolerance)
    if options.thresholds == "equal":
        return equal_point(tune, options.tolerance)
    path = path or settings(judged, options)
    p_values = (risk_p_value(options.risk, outcome(choice, certify).losses, options.tolerance, options.delta)
                for choice in path)
    index = walk(p_values, options.delta)
    if not pays(path[index], tune):
        return OperatingPoint((), ())
    return replace(path[index], safer=safer_settings(path, index, tune))


def pays(choice: OperatingPoint, tune: Candidates) -> bool:
    """Tell whether exits cost less than the plain backbone, by more than the draw of the batches could feign."""
    drawn = batch_costs(choice, outcome(choice, tune).exit, tune.costs)
    return bool(drawn.mean() + 1.645 * drawn.std() / len(drawn) ** 0.5 < 1)


def make_plan(choice: OperatingPoint, judged: HeadPredictions, heads: Sequence[TrainedHead], training_set: TrainingSet,
              backbone: BackboneDescription, options: TrainingOptions, profile: Profile | None = None) -> ExitPlan:
    """Write a choice down, with its certificate; without a profile every answered row leaves its batch."""
    layers = [heads[index].layer.path for index in choice.layers]
    shrink_from = profile.shrink_from(layers, options.batch_size) if profile else (1,) * len(layers)
    exits = tuple(
        PlannedExit(layer=heads[index].layer.path, head=heads[index].head.spec,
                    policy=ConfidencePolicy(judged.temperatures[index], threshold), cost=heads[index].layer.cost,
                    head_cost=head_flops(heads[index].head, heads[index].layer.shape) / backbone.flops,
                    shrink_from=least)
        for index, threshold, least in zip(choice.layers, choice.thresholds, shrink_from))
    found = outcome(choice, judged.certify)
    certificate = None
    if options.thresholds == "certified":
        certified_from = training_set.time[training_set.rows(Part.CERTIFY)].min().item()
        certificate = Certificate(
            risk=options.risk.value, tolerance=options.tolerance, confidence=options.confidence,
            n=len(judged.certify), k=int(found.differs.sum()), observed=found.losses.double().mean().item(),
            p_value=risk_p_value(options.risk, found.losses, options.tolerance, options.delta),
            method=METHODS[options.risk], window=(certified_from, training_set.time.max().item()))
    costs = judged.certify.costs
    return ExitPlan(backbone.sha256, options.thresholds, exits, certificate, engine=options.engine,
                    measure=costs.measure, batch_size=costs.batch_size,
                    expected_cost=mean_cost(choice, found.exit, costs), safer=choice.safer)
