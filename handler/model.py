"""The model object that stands in for the user's: the same call, with exits and taps for the records."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import spread_over
from early_exit.handler.backbone.pooling import Side, pool_activation
from early_exit.handler.backbone.signature import bind
from early_exit.handler.config import ServingConfig
from early_exit.handler.cuda.stages import graphed
from early_exit.handler.detection.detector import images_of
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.compiled_stage import read_and_pool
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES, engine_of, require_engine
from early_exit.handler.errors import ConfigError, InputError
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.inference_head import InferenceHead
from early_exit.handler.exits.plan import ExitPlan, PlannedExit, build_heads, load_plan
from early_exit.handler.inference.bypass import AdaptiveBypass
from early_exit.handler.inference.executor import Passes
from early_exit.handler.inference.fallbacks import stages_by_step
from early_exit.handler.inference.forward import Answers, Exit, Live, Stage, take_rows


@dataclass(frozen=True)
class ServedBatch:
    """One call of the model: its answers and what was tapped for the records."""

    answers: Answers
    activations: Mapping[str, Tensor]
    """By layer path: (S, ...) float16 pooled activations of the shadow rows; empty without taps."""
    time: float
    """Unix time in seconds."""
    step: int
    """Of `EarlyExitModel.steps`: the setting that answered."""
    sampling_rate: float
    """With which the shadow rows were drawn."""
    full_class: Tensor
    """(S,) int64: the class of the shadow rows on the engine that serves, had they run to the end; the answers'
    reference is always that of the backbone in fp32."""


Runner = Callable[[Live, Tensor, Tensor | None], ServedBatch]
"""Takes the backbone's (B, ...) inputs and the (B,) bool masks of shadow and, if there are any, of anytime rows."""


class _Calls(threading.local):
    """What was computed since the last time somebody asked, for each thread that calls the model."""

    def __init__(self) -> None:
        self.served: list[ServedBatch] = []
        self.is_computing = False
        self.anytime: Sequence[bool] = ()


class EarlyExitModel(nn.Module):
    """Maps (B, ...) input to (B, K) scores like the backbone, and lets confident rows leave early."""

    def __init__(self, backbone: Backbone, plan: ExitPlan | None = None, heads: Mapping[str, Head] | None = None,
                 *, engine: str = DEFAULT_ENGINE, sampling_rate: float = 0.0,
                 sampling_rate_in_full: float | None = None, record_layers: int = 0, record_pool: Side = None,
                 control_rate: float = 0.0, anytime: bool = False) -> None:
        """Cut the backbone where something is read and attach the plan's heads.

        Args:
            backbone: on the device that serves.
            plan: none answers every row in full.
            heads: by layer path, one for each exit of the plan.
            engine: how the backbone is executed; a name in `ENGINES`, or an identity.
            sampling_rate: share of rows that run to the end whatever the exits say.
            sampling_rate_in_full: the same once the exits are given up; by default as before.
            record_layers: how many candidate layers the shadow rows' activations are kept of at most, besides
                those with an exit; 0 keeps nothing.
            record_pool: side to which they are pooled.
            control_rate: share of batches that find out whether the exits save time.
            anytime: whether every request hears every exit.

        Raises:
            PlanError: the plan's heads and certificate are about another engine.
        """
        super().__init__()
        self.description, self.device = backbone.description, backbone.device
        planned = {exit_.layer: exit_ for exit_ in (plan.exits if plan else ())}
        recorded = spread_over(self.description.candidates, record_layers) if record_layers else []
        cuts = [layer for layer in self.description.candidates if layer.path in planned or layer in recorded]
        self.layers = tuple(layer.path for layer in cuts)
        """Module paths at which the backbone is cut, in order."""
        self.sampling_rate = sampling_rate
        self.records = record_layers > 0
        """Whether activations of shadow rows are kept."""
        self._record_pool = record_pool
        # Seeded by the system: the sample must not repeat in each worker, nor depend on the input.
        self._random = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "big"))
        self._calls, self._always_anytime = _Calls(), anytime
        self.run: Runner = self.run_at_once
        """How a batch gets through the stages."""
        self.engine = engine_of(engine)
        self.engine_identity = self.engine.identity(backbone.folder)
        if self.description.detector is not None and not self.engine.runs_detectors:
            able = " or ".join(engine.name for engine in ENGINES.values() if engine.runs_detectors)
            raise ConfigError(f"a detector is executed by {able}, found early_exit.engine {self.engine.name!r}")
        if plan is not None:
            require_engine(plan.engine, self.engine_identity)
        # The backbone itself is not kept: an engine may have its own copy of the weights.
        compiled = self.engine.compile(backbone, [layer.node for layer in cuts])
        self._parts = nn.ModuleList(stage.module for stage in compiled)
        self._original = None if self.engine.is_exact else ENGINES[DEFAULT_ENGINE].unsplit(backbone)
        self._reads = [stage.read for stage in compiled]
        served = {path: InferenceHead((heads or {})[path], planned[path].policy.temperature, read)
                  for path, read in zip(self.layers, self._reads) if path in planned}
        self._heads = nn.ModuleList(served.values())
        exits = [self._exit(planned[path], served[path]) if path in planned else None for path in self.layers]
        # The bound forward: Module.__call__ would hold a stage's input for as long as the stage runs.
        stages = [Stage(stage.module.forward, exit_) for stage, exit_ in zip(compiled, (*exits, None))]
        self.stages = graphed(stages, backbone.device) if self.description.detector is None else tuple(stages)
        self.steps = stages_by_step(self.stages, plan)
        """The stages as deployed, then in ever safer settings; without exits at last."""
        self.passes = Passes(self.steps)
        """Runs batches through them."""
        self.step = 0
        self.plan = plan
        self._sampling_rate_in_full = sampling_rate if sampling_rate_in_full is None else sampling_rate_in_full
        self.benefit = AdaptiveBypass(control_rate, lambda: torch.rand((), generator=self._random).item())
        self.eval()

    @classmethod
    def load(cls, layout: ArchiveLayout, config: ServingConfig, device: torch.device | str = "cpu") -> EarlyExitModel:
        """Load the model of an extracted archive, to serve and to record as configured.

        Raises:
            EarlyExitError: a file of the archive is damaged, too new, or of another backbone, or the engine does not
                run on the device.
        """
        if torch.device(device).type != "cpu" and not ENGINES[config.engine].on_gpu:
            raise ConfigError(f"early_exit.engine is {config.engine!r}, which runs on the CPU, but this worker was "
                              f"given {device}: set 'deviceType: cpu' in model-config.yaml, or another engine")
        backbone = load_backbone(layout.folder, device)
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
                   control_rate=config.control_rate, anytime=config.anytime).to(device)

    def prepare(self, batch_size: int, *, at_once: bool = True) -> None:
        """Let batches of up to that many rows find their graphs on a GPU, for `run_at_once` or for another `Runner`;
        does nothing elsewhere."""
        inputs = tuple(one.to(self.device) for one in self.description.probe_inputs())
        self.passes.prepare(inputs, batch_size, at_once=at_once)

    def forward(self, *given: object, **named: object) -> Any:
        """Return what the user's model would, with (B, K) scores, and keep what `take_served` returns.

        Raises:
            InputError: the inputs are not the backbone's in number, shape or dtype.
        """
        self._calls.is_computing = False
        inputs = bind(self.description.inputs, given, named)
        self._calls.is_computing = True
        if any(one.requires_grad for one in inputs):  # an explanation follows the gradient through the whole backbone
            scores = self._differentiable(inputs)
            self._calls.is_computing = False
            return self.description.output.output(scores)
        with torch.no_grad():
            shadow = torch.rand(len(inputs[0]), generator=self._random) < self.sampling_rate
            served = self.run(inputs, shadow, self._anytime(inputs))
        self._calls.served.append(served)
        self._calls.is_computing = False
        return self._as_the_users(served.answers)

    def _as_the_users(self, answers: Answers) -> Any:
        """Return answers as the user's model returns its own."""
        if self.description.detector is not None:
            return images_of(self.description.detector, answers.outputs, answers.stages.tolist(),
                             next(iter(answers.beside), None))
        return self.description.output.output(answers.outputs)

    def _anytime(self, inputs: Live) -> Tensor | None:
        """Return which rows ask for every exit's opinion; rows are requests where the handler makes one of each."""
        asked = self._calls.anytime
        if not any(asked) or len(asked) != len(inputs[0]):
            return None
        return torch.tensor(asked)

    def run_at_once(self, inputs: Live, shadow: Tensor, anytime: Tensor | None) -> ServedBatch:
        """Run a batch through all stages without a pause; a `Runner`."""
        taps: dict[str, Tensor] = {}

        def tap(stage: int, activation: Tensor) -> None:
            taps[self.layers[stage]] = self.pooled(stage, activation)

        rate, started = self.sampling_rate, time.perf_counter()
        # A batch in which somebody wants to hear the exits goes by them, and says nothing about what they cost.
        step = self.step if anytime is not None else self._step_of(len(shadow))
        answers = self.passes.run(step, inputs, shadow=shadow, anytime=anytime,
                                  observe=tap if self.records else None)
        if anytime is None:
            self._measure(answers.outputs, step, started)
        return self.batch(inputs, answers, taps, step, rate)

    def batch(self, inputs: Live, answers: Answers, activations: Mapping[str, Tensor], step: int,
              sampling_rate: float) -> ServedBatch:
        """Return what was served, with what the backbone in fp32 says of the shadow rows."""
        full_class = answers.reference.argmax(dim=1)
        if self._original is not None and len(answers.shadow):
            [reference] = self._original(*(take_rows(one, answers.shadow.to(one.device)) for one in inputs))
            answers = replace(answers, reference=reference)
        return ServedBatch(answers, activations, time.time(), step, sampling_rate, full_class)

    def _differentiable(self, inputs: Live) -> Tensor:
        """Return (B, K) scores that gradients flow through.

        Raises:
            InputError: the engine has none.
        """
        live = inputs
        for part in self._parts if self._original is None else [self._original]:
            live = part(*live)
        scores = live[0]
        if not scores.requires_grad:
            raise InputError(f"an explanation needs gradients, which the engine {self.engine.name} does not compute")
        return scores

    def pooled(self, stage: int, activation: Tensor) -> Tensor:
        """Return what is recorded of what travels from a stage: (S, ...) float16, on the CPU."""
        read = read_and_pool(activation, self._reads[stage], lambda x: pool_activation(x, self._record_pool))
        return read.half().cpu()

    def step_back(self, step: int) -> None:
        """Answer with another of `steps` from the next batch on."""
        self.step = step
        if step == self.last_step:
            self.sampling_rate = self._sampling_rate_in_full

    @property
    def last_step(self) -> int:
        """Of `steps`: the one without exits."""
        return len(self.steps) - 1

    def _step_of(self, n_rows: int) -> int:
        if self.step == self.last_step or self.benefit.takes_exits(n_rows):
            return self.step
        return self.last_step

    def _measure(self, outputs: Tensor, step: int, started: float) -> None:
        if self.step == self.last_step:
            return
        if outputs.is_cuda:
            torch.cuda.synchronize(outputs.device)
        self.benefit.measured(len(outputs), time.perf_counter() - started, with_exits=step != self.last_step)

    def start_call(self, anytime: Sequence[bool] = ()) -> None:
        """Forget what this thread computed before.

        Args:
            anytime: for each request of the call that begins whether it asks for every exit's opinion.
        """
        self.take_served()
        self._calls.is_computing = False
        self._calls.anytime = [True] * len(anytime) if self._always_anytime else anytime

    def take_served(self) -> list[ServedBatch]:
        """Return this thread's calls since the last time, oldest first."""
        served, self._calls.served = self._calls.served, []
        return served

    @property
    def is_computing(self) -> bool:
        """Whether a batch of this thread that was taken is computed, or has failed after that."""
        return self._calls.is_computing

    def _exit(self, planned: PlannedExit, head: InferenceHead) -> Exit:
        # The bound forward, as for the stages: fewer calls between the operations.
        return Exit(head.forward, planned.policy.on_answers(), self.description.scores.from_logits, planned.shrink_from)
