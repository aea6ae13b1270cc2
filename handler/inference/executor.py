"""How batches get through a version's stages: on a GPU in one launch where that can be, otherwise stage by stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from early_exit.handler.cuda.graphs import Graphed, sizes_up_to
from early_exit.handler.cuda.single_launch import SingleLaunch
from early_exit.handler.cuda.stages import GraphedStage, capture_stages
from early_exit.handler.inference.forward import Answers, Live, Observer, Stage, run_with_exits
from early_exit.handler.protocol import FULL

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
        self._batch_size = 0
        self._at_once: list[_Pass | None] = [None] * len(steps)

    def prepare(self, inputs: Live, batch_size: int, *, at_once: bool = True) -> None:
        """Let batches of up to that many rows find their graphs on a GPU; does nothing elsewhere.

        Args:
            inputs: like those to come, with one row.
            batch_size: the largest to come.
            at_once: whether batches come to `run`; otherwise the stages alone are prepared.
        """
        if not isinstance(self._steps[0][0], GraphedStage):
            return
        capture_stages(self._steps[0], inputs, batch_size)
        if at_once:
            self._batch_size = batch_size
            self._at_once = [_pass_through(cast(Sequence[GraphedStage], step), inputs, batch_size)
                             for step in self._steps]

    def run(self, step: int, inputs: Live, *, shadow: Tensor, anytime: Tensor | None = None,
            observe: Observer | None = None) -> Answers:
        """Return what `run_with_exits` does with the stages of a step; their seconds only if they were timed."""
        at_once = self._at_once[step]
        if at_once is None or anytime is not None or not 0 < len(shadow) <= self._batch_size or (
                observe is not None and shadow.any()):
            return run_with_exits(inputs, self._steps[step], shadow=shadow, anytime=anytime, observe=observe)
        return at_once(inputs, shadow)


def _pass_through(stages: Sequence[GraphedStage], inputs: Live, batch_size: int) -> _Pass | None:
    if not any(stage.exit for stage in stages):
        return _without_exits(stages, inputs, batch_size)
    try:
        return SingleLaunch(stages, batch_size)
    # The last two are what bindings raise that are older, or newer, than what is asked of them.
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:
        _LOG.warning("the GPU cannot decide itself who leaves (it needs CUDA 12.8 and its Python bindings), so the CPU "
                     "does: %s", error)
        return None


def _without_exits(stages: Sequence[GraphedStage], inputs: Live, batch_size: int) -> _Pass | None:
    def through_all(*live: Tensor) -> Live:
        return reduce(lambda live, stage: stage.graph.function(*live), stages, live)

    whole = Graphed(through_all, stages[0].graph.pool)
    # The largest first: smaller ones find the memory that it used.
    if not all(whole.captured(size, inputs) for size in reversed(sizes_up_to(batch_size))):
        return None

    def run(inputs: Live, shadow: Tensor) -> Answers:
        [scores], rows = whole(*inputs), shadow.nonzero().flatten()
        outputs = scores.clone()
        return Answers(outputs, torch.full((len(shadow),), FULL), rows, outputs[rows] if len(rows) else outputs[:0], (),
                       rows[:0], {})
    return run
