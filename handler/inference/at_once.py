"""The executor of plain batching: a batch goes through all stages without a pause."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from early_exit.handler.inference.executor import Execution, Record
from early_exit.handler.inference.forward import Live, Stage, run_with_exits


class AtOnceExecutor:
    """Runs each batch stage by stage; an `Executor`."""

    def __init__(self, levels: Sequence[Sequence[Stage]], record: Record | None = None) -> None:
        """Take the stages.

        Args:
            levels: the stages at each fallback level; the levels differ in their exits alone.
            record: computes what is recorded of an activation; with None, nothing is recorded.
        """
        self._levels, self._record = levels, record

    def prepare(self, inputs: Live, batch_size: int) -> None:
        """Do nothing: stages run as they are."""

    def run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        activations: dict[int, Tensor] = {}
        record = self._record

        def observe(stage: int, activation: Tensor) -> None:
            assert record is not None
            activations[stage] = record(stage, activation)

        answers = run_with_exits(inputs, self._levels[level], shadow=shadow, anytime=anytime,
                                 observe=observe if record is not None else None)
        return Execution(answers, activations, level)
