"""The model object that replaces the user's model: it is called in the same way, and has exits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.signature import bind
from early_exit.handler.cuda.stages import capture_stages
from early_exit.handler.detection.detector import images_of
from early_exit.handler.exits.switch import ExitSwitch, Position
from early_exit.handler.inference.bypassing import Bypass, BypassingExecutor
from early_exit.handler.inference.executor import Execution, Executor
from early_exit.handler.inference.forward import Answers, Live
from early_exit.handler.model.assembly import Assembly
from early_exit.handler.model.call_log import CallLog, ServedBatch
from early_exit.handler.model.shadow import ShadowSampler


class EarlyExitModel(nn.Module):
    """Maps (B, ...) input to (B, K) scores like the backbone, and lets confident rows leave early."""

    def __init__(self, assembly: Assembly, executor: Executor, bypass: Bypass, shadow: ShadowSampler, *,
                 anytime: bool = False) -> None:
        """Create the model from its parts.

        Args:
            assembly: the backbone and its exits.
            executor: runs batches of the assembly.
            bypass: decides which batches run without exits, because exits do not save time.
            shadow: draws the shadow rows.
            anytime: whether every request gets the scores of every exit.
        """
        super().__init__()
        self.assembly, self.executor, self.bypass, self.shadow = assembly, executor, bypass, shadow
        self.log = CallLog()
        """The log of calls, which the worker reads."""
        self.level = 0
        """The fallback level that the monitor has set."""
        self.switch = ExitSwitch(None, "")
        """The operator's switch, which may demand a higher fallback level."""
        self._bypassing = BypassingExecutor(executor, bypass, assembly.last_level)
        self._always_anytime = anytime
        self.eval()

    def prepare(self, batch_size: int) -> None:
        """Prepare for batches of up to `batch_size` rows; on a GPU, this captures their graphs."""
        inputs = self.assembly.probe_inputs()
        capture_stages(self.assembly.stages, inputs, batch_size)
        self.executor.prepare(inputs, batch_size)

    def forward(self, *given: object, **named: object) -> Any:
        """Return (B, K) scores in the form of the user's model's output, and add the call to `log`.

        Raises:
            InputError: the inputs differ from the backbone's in number, shape or dtype.
        """
        self.log.ends()
        description = self.assembly.description
        inputs = bind(description.inputs, given, named, description.constants, description.parameters)
        self.log.show(inputs)
        self.log.computes()
        if any(x.requires_grad for x in inputs):  # an explanation follows the gradient through the whole backbone
            scores = self.assembly.differentiable(inputs)
            self.log.ends()
            return description.output.output(scores)
        with torch.no_grad():
            rate = self.shadow.rate  # the monitor may change the rate while the call is in flight
            shadow, position = self.shadow.draw(len(inputs[0])), self.switch.read()
            # Before the run: while the call waits in it, a handler may fill the same tensors with the next request.
            reference = self.assembly.reference(inputs, shadow.nonzero().flatten())
            execution = self._bypassing.run(inputs, self._level_at(position), shadow, self._anytime(inputs))
            served = self._served(execution, reference, rate, position)
        self.log.add(served)
        return self._as_the_users(served.answers)

    def fall_back(self, level: int) -> None:
        """Answer at another fallback level from the next batch on."""
        self.level = level
        if level == self.assembly.last_level:
            self.shadow.exits_are_off()

    @property
    def takes_exits(self) -> bool:
        """Whether monitor and operator let requests leave early, at the position of the switch that was read last."""
        return self._level_at(self.switch.position) < self.assembly.last_level

    def _level_at(self, position: Position) -> int:
        """Return the fallback level that answers at a position of the operator's switch."""
        return max(self.level, position.level(self.assembly.last_level))

    def _anytime(self, inputs: Live) -> Tensor | None:
        """Return a (B,) bool mask of the rows that ask for every exit, or None if no row does."""
        n_rows = len(inputs[0])
        asks = [True] * n_rows if self._always_anytime else self.log.anytime_rows(n_rows)
        return torch.tensor(asks) if any(asks) else None

    def _served(self, execution: Execution, reference: Tensor | None, sampling_rate: float, position: Position
                ) -> ServedBatch:
        """Return the served batch. The reference of its shadow rows is the given one, the (S, K) fp32 scores of the
        backbone, unless the engine is exact."""
        answers = execution.answers
        full_scores = answers.reference
        if reference is not None:
            answers = replace(answers, reference=reference)
        activations: Mapping[str, Tensor] = {self.assembly.layers[stage]: activation
                                             for stage, activation in execution.activations.items()}
        return ServedBatch(answers, activations, time.time(), execution.level, sampling_rate, full_scores,
                           position)

    def _as_the_users(self, answers: Answers) -> Any:
        """Return answers in the form of the user's model's output, in tensors of their own."""
        description = self.assembly.description
        if description.detector is not None:
            return images_of(description.detector, answers.outputs, answers.stages.tolist(),
                             next(iter(answers.beside), None))
        # A copy, because a handler may change scores in place, and headers, records and monitor read them afterwards.
        return description.output.output(answers.outputs.clone())
