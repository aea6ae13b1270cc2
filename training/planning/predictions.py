"""What trained heads say about the records that they were not trained on; the ground of every choice and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.training.costs.cost import Costs
from early_exit.training.data.dataset import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.heads import TrainedHead
from early_exit.training.heads.trial import logits_of
from early_exit.training.selection.calibrate import fit_temperature
from early_exit.training.selection.risk import Risk
from early_exit.training.selection.thresholds import NEVER, Candidates


@dataclass(frozen=True)
class PartPredictions:
    """What L heads say about N records of one part."""

    candidates: Candidates
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
    """What calibrated heads say about *tune*, where they were calibrated, and *certify*."""

    layers: tuple[str, ...]
    """Paths of the L candidates, in order."""
    temperatures: tuple[float, ...]
    parts: dict[Part, PartPredictions]

    @property
    def tune(self) -> Candidates:
        return self.parts[Part.TUNE].candidates

    @property
    def certify(self) -> Candidates:
        return self.parts[Part.CERTIFY].candidates

    def save(self, path: Path) -> None:
        tensors = {"temperatures": torch.tensor(self.temperatures, dtype=torch.float64),
                   "stages": torch.from_numpy(self.tune.costs.stages).contiguous(),
                   "exits": torch.from_numpy(self.tune.costs.exits).contiguous()}
        for part, said in self.parts.items():
            for name, tensor in (("confidence", said.candidates.confidence), ("agrees", said.candidates.agrees),
                                 ("losses", said.candidates.losses),
                                 ("full_agrees", said.candidates.full_agrees),
                                 ("full_losses", said.candidates.full_losses), ("answers", said.answers),
                                 ("teacher", said.teacher), ("full", said.full), ("labels", said.labels)):
                tensors[f"{part.name}.{name}"] = tensor.contiguous()
        costs = self.tune.costs
        save_file(tensors, path, {"layers": json.dumps(self.layers), "measure": costs.measure,
                                  "batch_size": str(costs.batch_size)})

    @classmethod
    def load(cls, path: Path) -> HeadPredictions:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        costs = Costs(about["measure"], int(about["batch_size"]), tensors["stages"].numpy(), tensors["exits"].numpy())
        parts = {}
        for part in (Part.TUNE, Part.CERTIFY):
            read = {name: tensors[f"{part.name}.{name}"] for name in (
                "confidence", "agrees", "losses", "full_agrees", "full_losses", "answers", "teacher", "full", "labels")}
            said = Candidates(read["confidence"], read["agrees"], read["losses"], read["full_agrees"],
                              read["full_losses"], costs)
            parts[part] = PartPredictions(said, read["answers"], read["teacher"], read["full"], read["labels"])
        return cls(tuple(json.loads(about["layers"])), tuple(tensors["temperatures"].tolist()), parts)


def judge(training_set: TrainingSet, heads: Sequence[TrainedHead], costs: Costs, risk: Risk,
          labels: Tensor | None = None) -> HeadPredictions:
    """Calibrate the heads on *tune*, and let them judge *tune* and *certify*.

    Args:
        training_set: the records.
        heads: one for each of the costs' candidates.
        costs: of the candidates.
        risk: what an answer may lose; for accuracy, records without a label are left out.
        labels: (N,) true classes, -1 where unknown.
    """
    known = torch.full((training_set.n_records,), -1) if labels is None else labels
    parts = {}
    temperatures: tuple[float, ...] = ()
    for part in (Part.TUNE, Part.CERTIFY):
        rows = training_set.rows(part)
        if risk is Risk.ACCURACY:
            rows = rows[known[rows] >= 0]
        logits = torch.stack([logits_of(one.head.classify, one.head.spec, training_set.activations(one.layer), rows)
                              for one in heads], dim=1)  # (M, L, K)
        teacher = training_set.backbone_class[rows]
        if part is Part.TUNE:
            temperatures = tuple(fit_temperature(logits[:, index], teacher) for index in range(len(heads)))
        # The very formula that will serve.
        confidence = torch.stack([ConfidencePolicy(temperature, NEVER).confidence(logits[:, index])
                                  for index, temperature in enumerate(temperatures)], dim=1)
        answers = logits.argmax(dim=2)
        full = training_set.full_class[rows]
        losses = risk.losses(torch.cat([answers, full[:, None]], dim=1), teacher, training_set.log_probabilities[rows],
                             known[rows])
        said = Candidates(confidence, answers == teacher[:, None], losses[:, :-1], full == teacher, losses[:, -1],
                          costs)
        parts[part] = PartPredictions(said, answers, teacher, full, known[rows])
    return HeadPredictions(tuple(one.layer.path for one in heads), temperatures, parts)
