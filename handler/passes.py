"""How batches get through a version's stages: on a GPU in one launch where that can be, otherwise stage by stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

from torch import Tensor

from early_exit.handler.cuda_graphs import Graphed, sizes_up_to
from early_exit.handler.cuda_pass import GraphedPass
from early_exit.handler.cuda_stages import GraphedStage, capture_stages
from early_exit.handler.stages import Answers, Live, Observer, Stage, run_with_exits

_LOG = logging.getLogger(__name__)
_Pass = Callable[[Live, Tensor], Answers]
"""Takes (B, ...) inputs and the (B,) bool mask of shadow rows."""


class Passes:
    """Runs batches through the stages of one of several settings."""

    def __init__(self, steps: Sequence[Sequence[Stage]]) -> None:
        """Begin with nothing prepared: every batch goes stage by stage.

        Args:
            steps: of stages from `graphed` that differ in their exits alone.
        """
        self._steps = steps
        self._prepared: tuple[Live, int] | None = None
        self._launched: dict[int, _Pass | None] = {}

    def prepare(self, inputs: Live, batch_size: int) -> None:
        """Let batches of up to that many rows be launched at once on a GPU; does nothing elsewhere.

        Args:
            inputs: like those to come, with one row.
            batch_size: the largest to come.
        """
        if not isinstance(self._steps[0][0], GraphedStage):
            return
        capture_stages(self._steps[0], inputs, batch_size)
        self._prepared, self._launched = (inputs, batch_size), {}
        for step in (0, len(self._steps) - 1):
            self._at_once(step, batch_size)

    def run(self, step: int, inputs: Live, *, shadow: Tensor, anytime: Tensor | None = None,
            observe: Observer | None = None) -> Answers:
        """Return what `run_with_exits` does with the stages of a step; its stages' seconds only if they were timed."""
        if anytime is None and (observe is None or not shadow.any()):
            launch = self._at_once(step, len(shadow))
            if launch is not None:
                return launch(inputs, shadow)
        return run_with_exits(inputs, self._steps[step], shadow=shadow, anytime=anytime, observe=observe)

    def _at_once(self, step: int, n_rows: int) -> _Pass | None:
        if self._prepared is None or not 0 < n_rows <= self._prepared[1]:
            return None
        if step not in self._launched:
            self._launched[step] = _launched([one for one in self._steps[step] if isinstance(one, GraphedStage)],
                                             *self._prepared)
        return self._launched[step]


def _launched(stages: Sequence[GraphedStage], inputs: Live, batch_size: int) -> _Pass | None:
    if not any(stage.exit for stage in stages):
        return _without_exits(stages, inputs, batch_size)
    try:
        return GraphedPass(stages, inputs, batch_size)
    # AttributeError: bindings that are older than what is asked of them.
    except (RuntimeError, ImportError, AttributeError) as error:
        _LOG.warning("the GPU cannot decide itself who leaves (it needs CUDA 12.8 and its Python bindings), so the CPU "
                     "does: %s", error)
        return None


def _without_exits(stages: Sequence[GraphedStage], inputs: Live, batch_size: int) -> _Pass:
    def through_all(*live: Tensor) -> Live:
        return reduce(lambda live, stage: stage.graph.function(*live), stages, live)

    whole = Graphed(through_all, stages[0].graph.pool)
    for size in reversed(sizes_up_to(batch_size)):  # smaller ones find the memory that the largest used
        whole.captured(size, inputs)
    one = [Stage(lambda *live: tuple(x.clone() for x in whole(*live)))]
    return lambda inputs, shadow: replace(run_with_exits(inputs, one, shadow=shadow), stage_seconds=())
