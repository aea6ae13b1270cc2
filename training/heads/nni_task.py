"""The input of a trial in NNI's service. The trial reads records and writes its result in the folder of the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from early_exit.handler.files.private import replacing
from early_exit.training.costs.cost import FlopCost
from early_exit.training.data.training_set import TrainingSet
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.trial import Evaluator
from early_exit.training.paths import RunPaths


@dataclass(frozen=True)
class Task:
    """The parts of an evaluator that are the same for every layer.

    The cost of heads is counted in FLOPs here: the machines of trials differ, and trials that run side by side disturb
    each other's timing.
    """

    tolerance: float
    recipe: Distillation
    flops: int
    """The FLOPs of the backbone."""
    policy: str
    """The kind of policy that the exits will have."""

    @classmethod
    def of(cls, evaluator: Evaluator) -> Task:
        """Return the task of an evaluator that counts FLOPs."""
        if not isinstance(evaluator.head_cost, FlopCost):
            raise TypeError(f"a trial elsewhere cannot measure what a head costs here: {evaluator.head_cost!r}")
        return cls(evaluator.tolerance, evaluator.recipe, evaluator.head_cost.flops, evaluator.policy)

    def save(self, run: RunPaths) -> None:
        with replacing(run.task) as scratch:
            scratch.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, run: RunPaths) -> Task:
        data = json.loads(run.task.read_text())
        return cls(data["tolerance"], Distillation(**data["recipe"]), data["flops"], data["policy"])

    def evaluator(self, run: RunPaths, layer: str) -> Evaluator:
        """Return the evaluator of a layer."""
        training_set = TrainingSet.load(run.training_set)
        [candidate] = [candidate for candidate in training_set.layers if candidate.path == layer]
        return Evaluator(candidate, training_set, self.tolerance, self.recipe, FlopCost(self.flops),
                         self.policy)
