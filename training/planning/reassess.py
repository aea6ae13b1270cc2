"""Computes the present cost of a served plan: on the records of a new run, timed like the plan that may replace it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from early_exit.handler.backbone.backbone import BackboneDescription
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan
from early_exit.training.costs.profiling import Profile
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.heads.trial import logits_of
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.planning.exit_costs import exit_costs
from early_exit.training.selection.simulation import OperatingPoint, mean_cost


def cost_on_run(plan: ExitPlan, heads: Mapping[str, Head], run: RunPaths, backbone: BackboneDescription,
                options: TrainingOptions) -> float | None:
    """Return the expected cost of a request as a fraction of the backbone's, on the certify part of a finished run.

    Args:
        plan: a plan of the same backbone.
        heads: the heads of the plan, by layer path.
        run: the folder of the run, with its training set and, if the run measures time, its profile.
        backbone: the backbone of the plan and of the run.
        options: the options of the run.

    Returns:
        The cost; None if a layer of the plan is not in the run's records, or is pooled to another side there.
    """
    training_set = TrainingSet.load(run.training_set)
    layers = {layer.path: layer for layer in training_set.layers}
    if any(planned.layer not in layers or planned.head.recorded != training_set.recorded for planned in plan.exits):
        return None
    served = [TrainedHead(layers[planned.layer], heads[planned.layer]) for planned in plan.exits]
    profile = Profile.load(run.profile) if run.profile.exists() else None
    rows = training_set.rows(Part.CERTIFY)
    taken = torch.full((len(rows),), -1, dtype=torch.int64)
    for position, (planned, trained) in enumerate(zip(plan.exits, served)):
        logits = logits_of(trained.head.classify, trained.head.spec, training_set.activations(trained.layer), rows)
        taken[(taken == -1) & planned.policy(logits)] = position
    point = OperatingPoint(tuple(range(len(served))), tuple(planned.threshold for planned in plan.exits))
    policies = [planned.policy.kind for planned in plan.exits]
    return mean_cost(point, taken, exit_costs(profile, served, policies, backbone, options.batch_size))
