"""A backbone that is cut into an engine's stages, with the exits of a plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import spread_over
from early_exit.handler.backbone.pooling import Side, pool_activation
from early_exit.handler.cuda.stages import graphed
from early_exit.handler.engines.compiled_stage import read_and_pool, without_autocast
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES, engine_of, require_engine
from early_exit.handler.errors import ConfigError, InputError
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.inference_head import InferenceHead
from early_exit.handler.exits.plan import ExitPlan, PlannedExit
from early_exit.handler.inference.executor import Record
from early_exit.handler.inference.fallbacks import fallback_levels
from early_exit.handler.inference.forward import Exit, Live, Stage, take_rows
from early_exit.handler.model.precision import rounding_error
from early_exit.handler.protocol import FULL, FULL_NAME


class Assembly(nn.Module):
    """Everything that an executor needs to run batches, on the device of the backbone.

    It is a module only so that its weights move with the model that holds it. Nobody calls it.
    """

    def __init__(self, backbone: Backbone, plan: ExitPlan | None = None, heads: Mapping[str, Head] | None = None,
                 *, engine: str = DEFAULT_ENGINE, record_layers: int = 0) -> None:
        """Cut the backbone at the layers with an exit or a record, and attach the plan's heads.

        Args:
            backbone: the backbone, on the device that serves.
            plan: the plan with the exits, or None to answer every row in full.
            heads: the heads by layer path, one for each exit of the plan.
            engine: the engine that executes the backbone: a name in `ENGINES`, or an identity.
            record_layers: the largest number of candidate layers that are cut for the records, besides those with an
                exit.

        Raises:
            PlanError: the plan was made for another engine.
            ConfigError: the backbone is that of a detector, which the engine does not execute.
        """
        super().__init__()
        self.description, self.device, self.plan = backbone.description, backbone.device, plan
        self._probe = backbone.probe
        self.engine = engine_of(engine)
        self.max_probe_error = max(self.engine.max_probe_error, rounding_error(backbone))
        """The largest error of the probe's scores that other processors cause."""
        self.engine_identity = self.engine.identity(backbone.folder)
        if self.description.detector is not None and not self.engine.runs_detectors:
            able = " or ".join(engine.name for engine in ENGINES.values() if engine.runs_detectors)
            raise ConfigError(f"a detector needs the engine {able}, found early_exit.engine {self.engine.name!r}")
        if plan is not None:
            require_engine(plan.engine, self.engine_identity)
        planned = {exit_.layer: exit_ for exit_ in (plan.exits if plan else ())}
        recorded = spread_over(self.description.candidates, record_layers) if record_layers else []
        cuts = [layer for layer in self.description.candidates if layer.path in planned or layer in recorded]
        self.layers = tuple(layer.path for layer in cuts)
        """Module paths of the layers at which the backbone is cut, in order."""
        # The backbone itself is not kept: an engine may have its own copy of the weights.
        compiled = self.engine.compile(backbone, [layer.node for layer in cuts])
        self._parts = nn.ModuleList(stage.module for stage in compiled)
        self._original = None if self.engine.is_exact else ENGINES[DEFAULT_ENGINE].unsplit(backbone)
        self._reads = [stage.read for stage in compiled]
        inference_heads = {path: InferenceHead((heads or {})[path], planned[path].policy.temperature, read)
                           for path, read in zip(self.layers, self._reads) if path in planned}
        self._heads = nn.ModuleList(inference_heads.values())
        exits = [self._exit(planned[path], inference_heads[path]) if path in planned else None for path in self.layers]
        # `forward` is used directly: Module.__call__ would hold a stage's input for as long as the stage runs.
        stages = [Stage(stage.module.forward, exit_) for stage, exit_ in zip(compiled, (*exits, None))]
        self.stages = graphed(stages, backbone.device) if self.description.detector is None else tuple(stages)
        """The stages of the backbone in order, with the exits as they were deployed."""
        self.levels = fallback_levels(self.stages, plan)
        """The stages at each fallback level: first as deployed, then with more and more cautious exits, and at the last
        level without exits."""

    @property
    def last_level(self) -> int:
        """The fallback level without exits."""
        return len(self.levels) - 1

    def exit_name(self, stage: int) -> str:
        """Return the name, for clients and metrics, of the exit after a stage, or of the whole backbone for `FULL`."""
        return FULL_NAME if stage == FULL else self.layers[stage]

    def recorder(self, pool: Side) -> Record:
        """Return a function that converts activations for records: pooled to a side, in float16, on the CPU.

        Values that are not finite become NaN, and values that are too large for float16 become infinity.
        """
        def record(stage: int, activation: Tensor) -> Tensor:
            with without_autocast(activation.device):  # heads are trained on the records and run without it, too
                read = read_and_pool(activation, self._reads[stage], lambda x: pool_activation(x, pool))
            return torch.add(read, read, alpha=0).half().cpu()  # 0 times a value that is not finite is NaN

        return record

    def reference(self, inputs: Live, rows: Tensor) -> Tensor | None:
        """Return the (S, K) fp32 scores of the backbone for some rows, or None if the engine is exact or S is 0.

        Args:
            inputs: the backbone's (B, ...) inputs.
            rows: (S,) int64 numbers of rows, ascending, on the CPU.
        """
        if self._original is None or not len(rows):
            return None
        scores: Tensor
        with without_autocast(inputs[0].device):  # it is the reference of what a handler's autocast lowers, too
            [scores] = self._original(*(take_rows(x, rows.to(x.device)) for x in inputs))
        return scores

    def differentiable(self, inputs: Live) -> Tensor:
        """Return (B, K) scores of the whole backbone through which gradients can flow.

        Raises:
            InputError: the engine does not compute gradients.
        """
        live = inputs
        for part in self._parts if self._original is None else [self._original]:
            live = part(*live)
        scores = live[0]
        if not scores.requires_grad:
            raise InputError(f"an explanation needs gradients, which the engine {self.engine.name} does not compute")
        return scores

    def probe_inputs(self) -> Live:
        """Return the (1, ...) inputs of the backbone's probe, on the device that serves."""
        return tuple(x.to(self.device) for x in self._probe)

    def _exit(self, planned: PlannedExit, head: InferenceHead) -> Exit:
        # `forward` is used directly, as for the stages: there are fewer calls between the operations.
        return Exit(head.forward, planned.policy.on_answers(), self.description.scores.from_logits, planned.shrink_from)
