"""One trial of a search: trains a head, and computes the cost of serving with an exit at this head alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.special import bdtrc
from torch import Tensor

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.training.data.activation_file import Activations, Selected
from early_exit.training.data.split import Part
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.distill import Classify, Distillation, train_head
from early_exit.training.heads.space import spec_of
from early_exit.training.selection.calibrate import fit_policy
from early_exit.training.selection.thresholds import budget_threshold

LOOKS = 2
"""The number of times that a trial is evaluated while it trains, the end included."""
_CHUNK = 1024
_CHANCE_LEVEL = 0.01

HeadCost = Callable[[Head, CandidateLayer], float]
"""The cost of a head at a layer as a fraction of the backbone's."""


@dataclass(frozen=True)
class Trial:
    """The result of a trial of one head."""

    number: int
    parameters: Mapping[str, Any]
    """The parameters that the tuner asked for."""
    head: HeadSpec
    agreement: float
    """The share of the tune part on which the head's class is the backbone's."""
    better_than_chance: bool
    head_cost: float
    """The cost of the head as a fraction of the backbone's."""
    history: tuple[float, ...]
    """The objective at each look; the last is the result."""
    seconds: float

    @property
    def objective(self) -> float:
        """The cost of serving with this exit alone, as a fraction of the backbone's; smaller is better."""
        return self.history[-1]

    @property
    def stopped(self) -> bool:
        """Whether the trial was stopped before its end."""
        return len(self.history) < LOOKS

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Trial:
        data = json.loads(line)
        return cls(**{**data, "head": HeadSpec.from_json(data["head"]), "history": tuple(data["history"])})


@dataclass(frozen=True)
class Evaluator:
    """Trains heads on one layer and evaluates them, on the records of a run."""

    layer: CandidateLayer
    training_set: TrainingSet
    tolerance: float
    recipe: Distillation
    head_cost: HeadCost
    policy: str
    """The kind of policy that the exits will have."""

    def train(self, spec: HeadSpec, on_step: Callable[[int, Classify], bool]) -> Head:
        """Train a head on the train part."""
        rows = self.training_set.rows(Part.TRAIN)
        return train_head(spec, self.layer.shape, Selected(self.training_set.activations(self.layer), rows),
                          Selected(self.training_set.log_probabilities, rows), self.recipe, on_step)

    def n_steps(self) -> int:
        return self.recipe.n_steps(len(self.training_set.rows(Part.TRAIN)))

    def run(self, number: int, parameters: Mapping[str, Any],
            goes_on: Callable[[Trial], bool]) -> tuple[Trial, Head]:
        """Train and evaluate one head.

        Args:
            number: the number of the trial.
            parameters: the parameters that the tuner asks for.
            goes_on: receives the trial so far, and tells whether to continue it.
        """
        started = time.monotonic()
        spec = spec_of(parameters, self.layer.shape, self.training_set.recorded)
        cost = self.head_cost(Head(spec, self.layer.shape, self.training_set.n_classes).eval(), self.layer)
        looks = {round(self.n_steps() * look / LOOKS) for look in range(1, LOOKS)}
        trials: list[Trial] = []  # this trial, at each look
        stopped = False

        def look(classify: Classify) -> Trial:
            logits, teacher = self._on_tune(classify, spec)
            agrees = logits.argmax(dim=1) == teacher
            history = (*(trial.objective for trial in trials), self._objective(logits, agrees, teacher, cost))
            return Trial(
                number, dict(parameters), spec, agreement=agrees.double().mean().item(),
                better_than_chance=is_better_than_chance(agrees, teacher), head_cost=cost, history=history,
                seconds=round(time.monotonic() - started, 2))

        def on_step(step: int, classify: Classify) -> bool:
            nonlocal stopped
            if step in looks:
                trials.append(look(classify))
                stopped = not goes_on(trials[-1])
            return not stopped

        head = self.train(spec, on_step)
        if not stopped:
            trials.append(look(head.classify))
        return trials[-1], head

    def beats_chance(self, head: Head) -> bool:
        """Tell whether a trained head is better than chance on the tune part."""
        logits, teacher = self._on_tune(head.classify, head.spec)
        return is_better_than_chance(logits.argmax(dim=1) == teacher, teacher)

    def _on_tune(self, classify: Classify, spec: HeadSpec) -> tuple[Tensor, Tensor]:
        """Return the (M, K) logits of a head, and the (M,) classes of the backbone, on the tune part."""
        rows = self.training_set.rows(Part.TUNE)
        logits = logits_of(classify, spec, self.training_set.activations(self.layer), rows)
        return logits, self.training_set.backbone_class[rows]

    def _objective(self, logits: Tensor, agrees: Tensor, teacher: Tensor, head_cost: float) -> float:
        """Return the mean cost with this exit alone over budgets around the tolerance; a single budget is noisy."""
        confidence = fit_policy(self.policy, logits, teacher).confidence(logits)
        costs = []
        for budget in (self.tolerance / 2, self.tolerance, 2 * self.tolerance):
            hits = (confidence >= budget_threshold(confidence, agrees, budget)).double().mean().item()
            costs.append(head_cost + 1 - hits * (1 - self.layer.cost))
        return sum(costs) / len(costs)


def evaluators_of(training_set: TrainingSet, tolerance: float, recipe: Distillation, head_cost: HeadCost,
                  policy: str) -> list[Evaluator]:
    """Return an evaluator for each layer of a training set, in the order of the backbone."""
    return [Evaluator(layer, training_set, tolerance, recipe, head_cost, policy) for layer in training_set.layers]


def logits_of(classify: Classify, spec: HeadSpec, activations: Activations, rows: Tensor) -> Tensor:
    """Return the (M, K) logits of a head for some rows, a chunk at a time."""
    return torch.cat([classify(spec.reads(activations[chunk].float()))
                      for chunk in torch.split(rows, _CHUNK)])


def is_better_than_chance(agrees: Tensor, teacher: Tensor) -> bool:
    """Tell whether a head agrees with the (N,) teacher more often than always naming its commonest class would."""
    commonest = float(teacher.bincount().max()) / len(teacher)
    n_agree = int(agrees.sum())
    by_chance = float(bdtrc(n_agree - 1, len(agrees), commonest)) if n_agree else 1.0  # P(Binomial >= n_agree)
    return by_chance < _CHANCE_LEVEL
