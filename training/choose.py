"""From trained heads to a plan: calibrate, choose exits and thresholds on *tune*, prove them on *certify*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit.handler.backbone import BackboneDescription
from early_exit.handler.plan import Certificate, ExitPlan, PlannedExit
from early_exit.handler.policy import ConfidencePolicy
from early_exit.training.calibrate import fit_temperature
from early_exit.training.certify import METHODS, risk_p_value, walk
from early_exit.training.cost import Costs, head_flops
from early_exit.training.dataset import Part
from early_exit.training.heads import TrainedHead
from early_exit.training.material import Material
from early_exit.training.options import TrainingOptions
from early_exit.training.risk import Risk
from early_exit.training.thresholds import (
    NEVER,
    Candidates,
    Choice,
    batch_costs,
    certified_path,
    equal_choice,
    mean_cost,
    outcome,
    paper_choice,
)
from early_exit.training.trial import logits_of


@dataclass(frozen=True)
class Judged:
    """What the heads say about the records that they were not trained on."""

    tune: Candidates
    certify: Candidates
    temperatures: tuple[float, ...]
    rows: dict[Part, Tensor]
    """The (M,) records of both parts, for accuracy only those with a label."""
    logits: dict[Part, Tensor]
    """(M, L, K) of both parts."""


def judge(material: Material, heads: Sequence[TrainedHead], costs: Costs, options: TrainingOptions,
          labels: Tensor | None = None) -> Judged:
    """Calibrate the heads on *tune*, and let them judge *tune* and *certify*.

    Args:
        material: the records.
        heads: one for each of the costs' candidates.
        costs: of the candidates.
        options: names the risk.
        labels: (N,) true classes, -1 where unknown.
    """
    rows, logits, found = {}, {}, {}
    temperatures: tuple[float, ...] = ()
    for part in (Part.TUNE, Part.CERTIFY):
        rows[part] = material.rows(part)
        if options.risk is Risk.ACCURACY and labels is not None:
            rows[part] = rows[part][labels[rows[part]] >= 0]
        logits[part] = torch.stack([logits_of(one.head.classify, one.head.spec, material.activations(one.layer),
                                              rows[part]) for one in heads], dim=1)  # (M, L, K)
        teacher = material.backbone_class[rows[part]]
        if part is Part.TUNE:
            temperatures = tuple(fit_temperature(logits[part][:, index], teacher) for index in range(len(heads)))
        # The very formula that will serve.
        confidence = torch.stack([ConfidencePolicy(temperature, NEVER).confidence(logits[part][:, index])
                                  for index, temperature in enumerate(temperatures)], dim=1)
        answers = logits[part].argmax(dim=2)
        losses = options.risk.losses(answers, teacher, material.log_probabilities[rows[part]],
                                     None if labels is None else labels[rows[part]])
        found[part] = Candidates(confidence, answers == teacher[:, None], losses, costs)
    return Judged(found[Part.TUNE], found[Part.CERTIFY], temperatures, rows, logits)


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
    deployed = path[walk(p_values, options.delta)]
    return deployed if pays(deployed, tune) else Choice((), ())


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
                    batch_size=costs.batch_size, expected_cost=mean_cost(choice, found.exit, costs))
