"""The model object that stands in for the user's: the same call, with exits and taps for the records."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.backbone import Backbone
from early_exit.handler.benefit import Benefit
from early_exit.handler.candidates import spread_over
from early_exit.handler.config import ServingConfig
from early_exit.handler.engine import DEFAULT_ENGINE, ENGINES
from early_exit.handler.graph import split
from early_exit.handler.head import Head
from early_exit.handler.layout import ArchiveLayout
from early_exit.handler.plan import ExitPlan, PlannedExit, build_heads, load_plan
from early_exit.handler.pooling import Side, pool_activation
from early_exit.handler.signature import bind
from early_exit.handler.stages import Answers, Exit, Stage, run_with_exits
from early_exit.handler.steps import stages_by_step


@dataclass(frozen=True)
class ServedBatch:
    """One call of the model: its answers and what was tapped for the records."""

    answers: Answers
    activations: Mapping[str, Tensor]
    """By layer path: (S, ...) float16 pooled activations of the shadow rows; empty without taps."""
    time: float
    """Unix time in seconds."""
    step: int
    """Of `ServedModel.steps`: the setting that answered."""


class ServedModel(nn.Module):
    """Maps (B, ...) input to (B, K) scores like the backbone, and lets confident rows leave early."""

    def __init__(self, backbone: Backbone, plan: ExitPlan | None = None, heads: Mapping[str, Head] | None = None,
                 *, engine: str = DEFAULT_ENGINE, sampling_rate: float = 0.0,
                 sampling_rate_in_full: float | None = None, record_layers: int = 0, record_pool: Side = None,
                 control_rate: float = 0.0) -> None:
        """Cut the backbone where something is read and attach the plan's heads.

        Args:
            backbone: on the device that serves.
            plan: none answers every row in full.
            heads: by layer path, one for each exit of the plan.
            engine: how the backbone is executed; a name in `ENGINES`.
            sampling_rate: share of rows that run to the end whatever the exits say.
            sampling_rate_in_full: the same once the exits are given up; by default as before.
            record_layers: how many candidate layers the shadow rows' activations are kept of at most, besides
                those with an exit; 0 keeps nothing.
            record_pool: side to which they are pooled.
            control_rate: share of batches that find out whether the exits save time.
        """
        super().__init__()
        self.description = backbone.description
        planned = {exit_.layer: exit_ for exit_ in (plan.exits if plan else ())}
        recorded = spread_over(self.description.candidates, record_layers) if record_layers else []
        cuts = [layer for layer in self.description.candidates if layer.path in planned or layer in recorded]
        self.layers = tuple(layer.path for layer in cuts)
        """Module paths at which the backbone is cut, in order."""
        self.sampling_rate = sampling_rate
        self._observe = self._tap if record_layers else None
        self._record_pool = record_pool
        self._taps: dict[str, Tensor] = {}
        # Seeded by the system: the sample must not repeat in each worker, nor depend on the input.
        self._random = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "big"))
        self._served: list[ServedBatch] = []
        self.is_computing = False
        """True while a batch that was taken is computed, and after that has failed."""
        self.engine = ENGINES[engine]
        # The backbone itself is not kept: an engine may have its own copy of the weights.
        self._parts = nn.ModuleList(self.engine.compile(split(backbone.graph, [layer.node for layer in cuts])))
        self._heads = nn.ModuleList((heads or {}).values())
        exits = [self._exit(planned[path], (heads or {})[path]) if path in planned else None for path in self.layers]
        # The bound forward: Module.__call__ would hold a stage's input for as long as the stage runs.
        self.stages = tuple(Stage(part.forward, exit_) for part, exit_ in zip(self._parts, (*exits, None)))
        self.steps = stages_by_step(self.stages, plan)
        """The stages as deployed, then in ever safer settings; without exits at last."""
        self.step = 0
        self.plan = plan
        self._sampling_rate_in_full = sampling_rate if sampling_rate_in_full is None else sampling_rate_in_full
        self.benefit = Benefit(control_rate, lambda: torch.rand((), generator=self._random).item())
        self.eval()

    @classmethod
    def load(cls, layout: ArchiveLayout, config: ServingConfig, device: torch.device | str = "cpu") -> ServedModel:
        """Load the model of an extracted archive, to serve and to record as configured.

        Raises:
            EarlyExitError: a file of the archive is damaged, too new, or of another backbone.
        """
        backbone = Backbone.load(layout.folder, device)
        plan, heads = None, None
        if config.exits and layout.plan.exists():
            plan, tensors = load_plan(layout.plan)
            heads = build_heads(plan, tensors, backbone.description)
        records = config.records_folder() is not None
        sampled = records or (plan is not None and plan.certificate is not None)  # the monitor needs samples, too
        return cls(backbone, plan, heads, engine=config.engine, record_layers=config.layers if records else 0,
                   record_pool=config.pool_side,
                   sampling_rate=config.sampling(has_exits=plan is not None) if sampled else 0.0,
                   sampling_rate_in_full=config.sampling(has_exits=False) if records else 0.0,
                   control_rate=config.control_rate).to(device)

    def forward(self, *given: object, **named: object) -> Any:
        """Return what the user's model would, with (B, K) scores, and keep what `take_served` returns.

        Raises:
            InputError: the inputs are not the backbone's in number, shape or dtype.
        """
        self.is_computing = False
        inputs = bind(self.description.inputs, given, named)
        self.is_computing = True
        if any(one.requires_grad for one in inputs):  # an explanation follows the gradient through the whole backbone
            live = inputs
            for part in self._parts:
                live = part(*live)
            [scores] = live
            self.is_computing = False
            return self.description.output.output(scores)
        with torch.no_grad():
            shadow = torch.rand(len(inputs[0]), generator=self._random).to(inputs[0].device) < self.sampling_rate
            self._taps = {}
            step, started = self._step_of(len(inputs[0])), time.perf_counter()
            answers = run_with_exits(inputs, self.steps[step], shadow=shadow, observe=self._observe)
            self._measure(answers.outputs, step, started)
        self._served.append(ServedBatch(answers, self._taps, time.time(), step))
        self.is_computing = False
        return self.description.output.output(answers.outputs)

    def step_back(self, step: int) -> None:
        """Answer with another of `steps` from the next batch on."""
        self.step = step
        if step == self._last_step:
            self.sampling_rate = self._sampling_rate_in_full

    @property
    def _last_step(self) -> int:
        return len(self.steps) - 1

    def _step_of(self, n_rows: int) -> int:
        if self.step == self._last_step or self.benefit.takes_exits(n_rows):
            return self.step
        return self._last_step

    def _measure(self, outputs: Tensor, step: int, started: float) -> None:
        if self.step == self._last_step:
            return
        if outputs.is_cuda:
            torch.cuda.synchronize(outputs.device)
        self.benefit.measured(len(outputs), time.perf_counter() - started, with_exits=step != self._last_step)

    def take_served(self) -> list[ServedBatch]:
        """Return the calls since the last time, oldest first."""
        served, self._served = self._served, []
        return served

    def _exit(self, planned: PlannedExit, head: Head) -> Exit:
        scores = self.description.scores
        return Exit(head, planned.policy(), lambda logits: scores.from_logits(logits / planned.temperature),
                    planned.shrink_from)

    def _tap(self, stage: int, activation: Tensor) -> None:
        if stage < len(self.layers):
            self._taps[self.layers[stage]] = pool_activation(activation, self._record_pool).half().cpu()
