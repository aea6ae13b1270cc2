"""The served model on the inputs of a probe, with rows that leave at the exits where recorded requests left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.exits.policy import ExitPolicy
from early_exit.handler.inference.forward import Answers, Live, run_with_exits
from early_exit.handler.model.assembly import Assembly
from early_exit.handler.protocol import FULL


class ScriptedModel:
    """A backbone and the exits of a plan, which decide as in service but let rows leave where a script says.

    The cost of dense operations does not depend on values, so no request is needed to measure it.
    """

    def __init__(self, backbone: Backbone, plan: ExitPlan, heads: Mapping[str, Head],
                 device: torch.device | str = "cpu") -> None:
        """Prepare the model on a device; the backbone must be there already."""
        assembly = Assembly(backbone, plan, heads, engine=plan.engine).to(device)
        self._device = device
        self._leaves: list[Tensor] = []
        self._items = [item.to(device) for item in backbone.probe]
        self._n_exits = len(plan.exits)
        self._stages = [
            replace(stage, exit=stage.exit and replace(stage.exit, policy=self._scripted(number, stage.exit.policy)))
            for number, stage in enumerate(assembly.stages)]

    def script(self, exits: Tensor) -> Live:
        """Set the (B,) exits at which rows will leave, or `FULL`, and return the inputs of a batch of B rows."""
        travels = [exits[(exits == FULL) | (exits >= number)] for number in range(self._n_exits)]
        self._leaves = [(still == number).to(self._device) for number, still in enumerate(travels)]
        return tuple(item.expand(len(exits), *item.shape[1:]).contiguous() for item in self._items)

    def __call__(self, *inputs: Tensor) -> Answers:
        """Answer the batch that `script` returned."""
        return run_with_exits(inputs, self._stages)

    def _scripted(self, number: int, policy: ExitPolicy) -> ExitPolicy:
        def decide(logits: Tensor) -> Tensor:
            policy(logits)  # for its cost only
            return self._leaves[number]

        return decide
