"""From the predictions of heads to a plan: choose exits and thresholds on *tune*, and certify them on *certify*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.errors import RecordError
from early_exit.handler.exits.plan import Certificate, ExitPlan, PlannedExit
from early_exit.training.costs.cost import head_flops
from early_exit.training.costs.profiling import Profile
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.options import TrainingOptions
from early_exit.training.planning.predictions import HeadPredictions
from early_exit.training.selection.certify import method_of, walk
from early_exit.training.selection.simulation import Candidates, OperatingPoint, batch_costs, mean_cost, outcome
from early_exit.training.selection.thresholds import (
    certified_path,
    equal_point,
    expected_losses,
    paper_point,
    safer_settings,
)


def path_to_certify(predictions: HeadPredictions, options: TrainingOptions) -> list[OperatingPoint]:
    """Return the operating points among which a certified one is chosen, from "never exit" to aggressive."""
    tune = predictions.tune.candidates
    expected = replace(tune, losses=expected_losses(options.risk, tune.losses, tune.error_chance))
    return certified_path(expected, options.tolerance, options.delta, predictions.evidence.n_tested)


def choose(predictions: HeadPredictions, options: TrainingOptions,
           path: Sequence[OperatingPoint] | None = None) -> OperatingPoint:
    """Return the exits and thresholds to deploy; no exits if they would not pay.

    Args:
        predictions: the predictions of the heads.
        options: the options of the run.
        path: the result of `path_to_certify`, if it is known already.

    Raises:
        RecordError: the records cannot certify even the setting in which no request leaves early.
    """
    tune = predictions.tune.candidates
    if options.thresholds == "paper":
        return paper_point(tune, options.tolerance)
    if options.thresholds == "equal":
        return equal_point(tune, options.tolerance)
    path = path or path_to_certify(predictions, options)
    index = walk((_p_value(point, predictions, options) for point in path), options.delta)
    if index < 0:
        lost = outcome(path[0], predictions.certify.candidates).losses.double().mean().item()
        raise RecordError(
            f"{len(predictions.certify)} records in {predictions.evidence.n_blocks} blocks cannot certify "
            f"{options.tolerance:.2%} at {options.confidence:.0%} confidence even for a plan without exits, which "
            f"loses {lost:.2%} with the engine {options.engine}: collect more, or ask for a larger --tolerance")
    if not pays(path[index], tune):
        return OperatingPoint((), ())
    return replace(path[index], safer=safer_settings(path, index, tune))


def _p_value(point: OperatingPoint, predictions: HeadPredictions, options: TrainingOptions) -> float:
    """Return the p-value, on the certify part, of the hypothesis that the expected loss is above the tolerance."""
    losses = outcome(point, predictions.certify.candidates).losses
    return predictions.evidence.p_value(options.risk, losses, options.tolerance, options.delta)


def pays(point: OperatingPoint, tune: Candidates) -> bool:
    """Tell whether exits cost less than the plain backbone, by more than the random draw of batches can explain."""
    drawn = batch_costs(point, outcome(point, tune).exit, tune.costs)
    return bool(drawn.mean() + 1.645 * drawn.std() / len(drawn) ** 0.5 < 1)


def make_plan(point: OperatingPoint, predictions: HeadPredictions, heads: Sequence[TrainedHead],
              training_set: TrainingSet, backbone: BackboneDescription, options: TrainingOptions,
              profile: Profile | None = None) -> ExitPlan:
    """Return the plan for an operating point, with its certificate.

    Args:
        point: the result of `choose`.
        predictions: the predictions of the heads.
        heads: all candidates, in the order of the backbone.
        training_set: the records of the predictions.
        backbone: the backbone that the plan is for.
        options: the options of the run.
        profile: measured times; without them, every answered row leaves its batch.
    """
    chosen = [heads[index] for index in point.layers]
    paths = [trained.layer.path for trained in chosen]
    shrink_from = profile.shrink_from(paths, options.batch_size) if profile else (1,) * len(paths)
    exits = tuple(
        PlannedExit(layer=trained.layer.path, head=trained.head.spec, cost=trained.layer.cost,
                    policy=replace(predictions.policies[index], threshold=threshold),
                    head_cost=head_flops(trained.head, trained.layer.shape) / backbone.flops, shrink_from=least)
        for trained, index, threshold, least in zip(chosen, point.layers, point.thresholds, shrink_from))
    certify = predictions.certify.candidates
    simulated = outcome(point, certify)
    certificate = None
    if options.thresholds == "certified":
        evidence, alike = predictions.evidence, training_set.split.likeness
        certified_from = training_set.time[training_set.rows(Part.CERTIFY)].min().item()
        certificate = Certificate(
            risk=options.risk, tolerance=options.tolerance, confidence=options.confidence, n=len(certify),
            k=int(simulated.differs.sum()), observed=simulated.losses.double().mean().item(),
            p_value=_p_value(point, predictions, options),
            method=method_of(options.risk, in_blocks=evidence.in_blocks),
            window=(certified_from, training_set.time.max().item()), contents=evidence.n_contents,
            blocks=evidence.n_blocks, block_length=alike.length if alike else 0.0, largest_block=evidence.largest[0],
            is_trend=training_set.split.is_trend)
    return ExitPlan(backbone.sha256, options.thresholds, exits, certificate, engine=options.engine,
                    measure=certify.costs.measure, batch_size=certify.costs.batch_size,
                    expected_cost=mean_cost(point, simulated.exit, certify.costs), safer=point.safer,
                    likeness=training_set.split.likeness)
