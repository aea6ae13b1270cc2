"""Properties that every executor must have. One executor is defined only here, to show that new ones can be added."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from early_exit.handler.inference.at_once import AtOnceExecutor
from early_exit.handler.inference.bypass import AdaptiveBypass
from early_exit.handler.inference.bypassing import BypassingExecutor
from early_exit.handler.inference.continuous import ContinuousExecutor
from early_exit.handler.inference.executor import Execution, Executor, Record
from early_exit.handler.inference.forward import Answers, Live, Stage, run_with_exits
from early_exit.handler.protocol import FULL
from tests.handler.test_forward import inputs, three_stages

Levels = Sequence[Sequence[Stage]]
Run = Callable[[Sequence[tuple[Live, int, Tensor, Tensor]]], list[Execution]]
"""A function that runs batches, each given with its fallback level, shadow mask and anytime mask."""


class RowByRowExecutor:
    """An executor that runs every row alone: the slowest one that has the required properties."""

    def __init__(self, levels: Levels, record: Record) -> None:
        self._levels, self._record = levels, record

    def prepare(self, inputs: Live, batch_size: int) -> None: ...

    def run(self, inputs: Live, level: int, shadow: Tensor, anytime: Tensor | None = None) -> Execution:
        activations: dict[int, list[Tensor]] = {}
        asks = torch.zeros(len(shadow), dtype=torch.bool) if anytime is None else anytime

        def observe(stage: int, x: Tensor) -> None:
            activations.setdefault(stage, []).append(self._record(stage, x))

        rows = [run_with_exits(tuple(x[row:row + 1] for x in inputs), self._levels[level], observe=observe,
                               shadow=shadow[row:row + 1], anytime=asks[row:row + 1]) for row in range(len(shadow))]
        stages = sorted({stage for answers in rows for stage in answers.exit_scores}, key=lambda stage: stage % 99)
        return Execution(Answers(
            torch.cat([answers.outputs for answers in rows]), torch.cat([answers.stages for answers in rows]),
            shadow.nonzero().flatten(), torch.cat([answers.reference for answers in rows]), (),
            asks.nonzero().flatten(),
            {stage: torch.cat([answers.exit_scores[stage] for answers in rows if stage in answers.exit_scores])
             for stage in stages}), {stage: torch.cat(parts) for stage, parts in activations.items()}, level)


def one_after_the_other(executor: Executor) -> Run:
    def run(batches: Sequence[tuple[Live, int, Tensor, Tensor]]) -> list[Execution]:
        return [executor.run(*batch) for batch in batches]

    return run


def all_at_the_same_time(executor: ContinuousExecutor) -> Run:
    """Return a function that runs each batch in its own coroutine and starts a new one after each stage."""
    def run(batches: Sequence[tuple[Live, int, Tensor, Tensor]]) -> list[Execution]:
        coroutines = []
        for batch in batches:
            coroutines.append(executor.start(lambda batch=batch: executor.run(*batch)))
            executor.run_stage()
        for _ in range(100):
            if all(coroutine.done for coroutine in coroutines):
                return [coroutine.result() for coroutine in coroutines]
            executor.run_stage()
        raise AssertionError("a call never ends")

    return run


def record(stage: int, activation: Tensor) -> Tensor:
    return activation * (stage + 2)


EXECUTORS: dict[str, Callable[[Levels], Run]] = {
    "at once": lambda levels: one_after_the_other(AtOnceExecutor(levels, record)),
    "continuous, from a coroutine": lambda levels: all_at_the_same_time(ContinuousExecutor(levels, record)),
    "continuous, from outside": lambda levels: one_after_the_other(ContinuousExecutor(levels, record)),
    "with a bypass that takes the exits": lambda levels: one_after_the_other(BypassingExecutor(
        AtOnceExecutor(levels, record), AdaptiveBypass(0.0, lambda: 0.5), len(levels) - 1)),
    "row by row": lambda levels: one_after_the_other(RowByRowExecutor(levels, record)),
}


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 1000),
       thresholds=st.tuples(st.floats(0.2, 1.1), st.floats(0.2, 1.1)), share=st.sampled_from([0.0, 0.4, 1.0]))
@torch.no_grad()
def test_rows_leave_at_the_first_sure_exit_and_all_that_is_told_of_them_is_theirs(
        name: str, sizes: list[int], seed: int, thresholds: tuple[float, float], share: float) -> None:
    levels = [three_stages(*thresholds), three_stages(0.5, 0.9), three_stages(2.0, 2.0)]
    generator = torch.Generator().manual_seed(seed)
    batches = [(inputs(size, seed + number), number % 3, torch.rand(size, generator=generator) < share,
                torch.rand(size, generator=generator) < share / 2) for number, size in enumerate(sizes)]
    for batch, execution in zip(batches, EXECUTORS[name](levels)(batches), strict=True):
        check(levels[batch[1]], *batch, execution)


def check(stages: Sequence[Stage], batch: Live, level: int, shadow: Tensor, anytime: Tensor,
          execution: Execution) -> None:
    """Compare an execution with what each row gives alone, computed from the stages and exit heads only."""
    answers = execution.answers
    assert execution.level == level
    assert answers.shadow.tolist() == shadow.nonzero().flatten().tolist()
    assert answers.anytime.tolist() == anytime.nonzero().flatten().tolist()
    n_shadow = n_anytime = 0
    for row in range(len(shadow)):
        live, left, output = (batch[0][row:row + 1],), FULL, None
        for number, stage in enumerate(stages):
            live = stage.forward(*live)
            if stage.exit is None:
                continue
            logits = stage.exit.head(live[0])
            scores = stage.exit.answer(logits)
            if left == FULL and bool(stage.exit.policy(logits)):
                left, output = number, scores
            if anytime[row]:
                torch.testing.assert_close(answers.exit_scores[number][n_anytime], scores[0])
            if shadow[row]:
                torch.testing.assert_close(execution.activations[number][n_shadow], record(number, live[0])[0])
        torch.testing.assert_close(answers.outputs[row], (live[0] if output is None else output)[0])
        assert answers.stages[row] == left
        if shadow[row]:
            torch.testing.assert_close(answers.reference[n_shadow], live[0][0])
        if anytime[row]:
            torch.testing.assert_close(answers.exit_scores[FULL][n_anytime], live[0][0])
        n_shadow, n_anytime = n_shadow + int(shadow[row]), n_anytime + int(anytime[row])
    assert len(answers.reference) == n_shadow


@torch.no_grad()
def test_a_bypass_lets_batches_go_without_exits_unless_somebody_asks_for_them() -> None:
    levels = [three_stages(0.0, 0.0), three_stages(2.0, 2.0)]
    never = AdaptiveBypass(1.0, lambda: 0.5)  # every batch is a control batch, which does the opposite
    executor, nobody = BypassingExecutor(AtOnceExecutor(levels), never, 1), torch.zeros(3, dtype=torch.bool)
    assert executor.run(inputs(3), 0, nobody).level == 1
    assert executor.run(inputs(3), 0, nobody, ~nobody).level == 0
