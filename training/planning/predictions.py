"""The predictions of trained heads for records that they were not trained on: the basis of every choice and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from early_exit.handler.backbone.scores import NO_CLASS
from early_exit.handler.exits.policy import PlannedPolicy, policy_of
from early_exit.handler.exits.risk import Risk
from early_exit.training.costs.cost import Costs
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.heads.trial import logits_of
from early_exit.training.selection.calibrate import fit_policy
from early_exit.training.selection.evidence import Evidence
from early_exit.training.selection.simulation import Candidates

_OF_CANDIDATES = ("confidence", "error_chance", "agrees", "losses", "full_agrees", "full_losses")
_OF_PART = ("answers", "teacher", "full", "labels")
_OF_EVIDENCE = ("block", "content", "is_new")


@dataclass(frozen=True)
class PartPredictions:
    """The predictions of L heads for the N records of one part."""

    candidates: Candidates
    """The heads as candidates for exits."""
    answers: Tensor
    """(N, L) int64: the heads' classes."""
    teacher: Tensor
    """(N,) int64: the backbone's class."""
    full: Tensor
    """(N,) int64: the class that is served without an exit."""
    labels: Tensor
    """(N,) int64: the true class, -1 where unknown."""

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class HeadPredictions:
    """The predictions of heads for *tune*, on which they were calibrated, and for *certify*."""

    layers: tuple[str, ...]
    """The paths of the L candidates, in order."""
    policies: tuple[PlannedPolicy, ...]
    """The policy of each head, fitted on *tune*; its threshold is not chosen yet."""
    tune: PartPredictions
    certify: PartPredictions
    evidence: Evidence
    """The evidence that the records of *certify* give: their blocks and contents."""

    def save(self, path: Path) -> None:
        costs = self.tune.candidates.costs
        tensors = {"stages": torch.from_numpy(costs.stages).contiguous(),
                   "exits": torch.from_numpy(costs.exits).contiguous()}
        for part, predictions in ((Part.TUNE, self.tune), (Part.CERTIFY, self.certify)):
            for owner, names in ((predictions.candidates, _OF_CANDIDATES), (predictions, _OF_PART)):
                tensors |= {f"{part.name}.{name}": getattr(owner, name).contiguous() for name in names}
        tensors |= {name: getattr(self.evidence, name).contiguous() for name in _OF_EVIDENCE}
        save_file(tensors, path, {"layers": json.dumps(self.layers), "measure": costs.measure,
                                  "batch_size": str(costs.batch_size),
                                  "blocks": json.dumps([self.evidence.largest, self.evidence.expected]),
                                  "policies": json.dumps([policy.to_json() for policy in self.policies])})

    @classmethod
    def load(cls, path: Path) -> HeadPredictions:
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            # The file is not a mapping, so `file.keys()` is needed.
            about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        costs = Costs(about["measure"], int(about["batch_size"]), tensors["stages"].numpy(), tensors["exits"].numpy())

        def read(part: Part) -> PartPredictions:
            of_part = {name: tensors[f"{part.name}.{name}"] for name in (*_OF_CANDIDATES, *_OF_PART)}
            candidates = Candidates(**{name: of_part[name] for name in _OF_CANDIDATES}, costs=costs)
            return PartPredictions(candidates, **{name: of_part[name] for name in _OF_PART})

        largest, expected = json.loads(about["blocks"])
        evidence = Evidence(**{name: tensors[name] for name in _OF_EVIDENCE}, largest=tuple(largest),
                            expected=expected and tuple(expected))
        return cls(tuple(json.loads(about["layers"])), tuple(map(policy_of, json.loads(about["policies"]))),
                   read(Part.TUNE), read(Part.CERTIFY), evidence)


def predict(training_set: TrainingSet, heads: Sequence[TrainedHead], costs: Costs, risk: Risk, policy: str,
            labels: Tensor | None = None) -> HeadPredictions:
    """Calibrate the heads on *tune*, and return their predictions for *tune* and *certify*.

    Args:
        training_set: the records.
        heads: one for each candidate of the costs.
        costs: the costs of the candidates.
        risk: the measure of the losses; for `accuracy`, records without a label are left out.
        policy: the kind of policy that is fitted to each head.
        labels: (N,) true classes, -1 where unknown.
    """
    known = torch.full((training_set.n_records,), -1) if labels is None else labels
    counts = known >= (0 if risk is Risk.ACCURACY else -1)

    def rows_of(part: Part) -> Tensor:
        rows = training_set.rows(part)
        return rows[counts[rows]]

    def logits_for(rows: Tensor) -> Tensor:
        return torch.stack([logits_of(trained.head.classify, trained.head.spec, training_set.activations(trained.layer),
                                      rows) for trained in heads], dim=1)  # (M, L, K)

    def predictions_for(rows: Tensor, logits: Tensor) -> PartPredictions:
        teacher, full = training_set.backbone_class[rows], training_set.full_class[rows]
        # These formulas are also used in service.
        confidence = torch.stack([fitted.confidence(logits[:, index]) for index, fitted in enumerate(policies)], dim=1)
        error_chance = torch.stack([fitted.error_chance(logits[:, index]) for index, fitted in enumerate(policies)],
                                   dim=1)
        answers = logits.argmax(dim=2)
        losses = risk.losses(torch.cat([answers, full[:, None]], dim=1), teacher, training_set.log_probabilities[rows],
                             known[rows])
        agrees, of_heads = answers == teacher[:, None], losses[:, :-1]
        # A head's answer to activations that were too large to record is unknown: it counts as the worst answer.
        unknown = ~training_set.finite[rows][:, None]
        candidates = Candidates(confidence.masked_fill(unknown, 1.0), error_chance.masked_fill(unknown, 1.0),
                                agrees & ~unknown, of_heads.masked_fill(unknown, 1.0), full == teacher, losses[:, -1],
                                costs)
        return PartPredictions(candidates, answers.masked_fill(unknown, NO_CLASS), teacher, full, known[rows])

    tune, certify = rows_of(Part.TUNE), rows_of(Part.CERTIFY)
    tune_logits = logits_for(tune)
    policies = tuple(fit_policy(policy, tune_logits[:, index], training_set.backbone_class[tune])
                     for index in range(len(heads)))
    return HeadPredictions(tuple(trained.layer.path for trained in heads), policies,
                           predictions_for(tune, tune_logits), predictions_for(certify, logits_for(certify)),
                           training_set.split.evidence(counts))
