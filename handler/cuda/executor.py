"""The executor of plain batching on a GPU: a batch runs in a single launch if possible, otherwise stage by stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from early_exit.handler.cuda.graphs import Graphed, sizes_up_to
from early_exit.handler.cuda.single_launch import SingleLaunch
from early_exit.handler.cuda.stages import GraphedStage
from early_exit.handler.inference.at_once import AtOnceExecutor
from early_exit.handler.inference.executor import Execution, Executor, Record
from early_exit.handler.inference.forward import Answers, Live, Stage
from early_exit.handler.protocol import FULL

_LOG = logging.getLogger(__name__)
_Launch = Callable[[Live, Tensor], Answers]
"""Takes (B, ...) inputs and the (B,) bool mask of the shadow rows."""


class GraphedExecutor:
    """Runs batches through stages of CUDA graphs; an `Executor`.

    A batch runs stage by stage if the CPU must read results between two stages. Such results are activations of shadow
    rows to record, and the scores of every exit.
    """

    def __init__(self, levels: Sequence[Sequence[GraphedStage]], record: Record | None = None) -> None:
        """Take the stages; until `prepare` is called, every batch runs stage by stage.

        Args:
            levels: the stages from `graphed` at each fallback level; the levels differ in their exits alone.
            record: computes what is recorded of an activation; with None, nothing is recorded.
        """
        self._levels, self._records = levels, record is not None
        self._by_stage = AtOnceExecutor(levels, record)
        self._batch_size = 0
        self._launches: list[_Launch | None] = [None] * len(levels)

    def prepare(self, inputs: Live, batch_size: int) -> None:
        """Combine the graphs of each level; the graphs of the stages have been captured already."""
        self._batch_size = batch_size
        self._launches = [_launch_of(stages, inputs, batch_size) for stages in self._levels]

    def run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        """Run a batch; the seconds of its stages are known only if it runs stage by stage."""
        launch = self._launches[level]
        if launch is None or anytime is not None or not 0 < len(shadow) <= self._batch_size or (
                self._records and shadow.any()):
            return self._by_stage.run(inputs, level, shadow, anytime)
        return Execution(launch(inputs, shadow), {}, level)


def plain_executor(levels: Sequence[Sequence[Stage]], record: Record | None = None) -> Executor:
    """Return the executor of plain batching for stages that `graphed` returned, on a GPU or a CPU.

    Args:
        levels: the stages at each fallback level; the levels differ in their exits alone.
        record: computes what is recorded of an activation; with None, nothing is recorded.
    """
    if isinstance(levels[0][0], GraphedStage):
        return GraphedExecutor(cast(Sequence[Sequence[GraphedStage]], levels), record)
    return AtOnceExecutor(levels, record)


def _launch_of(stages: Sequence[GraphedStage], inputs: Live, batch_size: int) -> _Launch | None:
    if not any(stage.exit for stage in stages):
        return _without_exits(stages, inputs, batch_size)
    try:
        return SingleLaunch(stages, batch_size)
    # Bindings of an older or newer version raise AttributeError or TypeError.
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:
        _LOG.warning("the GPU cannot decide itself which rows leave (this needs CUDA 12.8 and its Python bindings), so "
                     "the CPU decides: %s", error)
        return None


def _without_exits(stages: Sequence[GraphedStage], inputs: Live, batch_size: int) -> _Launch | None:
    def through_all(*live: Tensor) -> Live:
        return reduce(lambda live, stage: stage.graph.function(*live), stages, live)

    whole = Graphed(through_all, stages[0].graph.pool)
    # The largest size comes first, so that smaller ones can reuse its memory.
    if not all(whole.captured(size, inputs) for size in reversed(sizes_up_to(batch_size))):
        return None

    def launch(inputs: Live, shadow: Tensor) -> Answers:
        [scores], rows = whole(*inputs), shadow.nonzero().flatten()
        outputs = scores.clone()
        return Answers(outputs, torch.full((len(shadow),), FULL), rows, outputs[rows] if len(rows) else outputs[:0], (),
                       rows[:0], {})
    return launch
