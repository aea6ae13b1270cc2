"""run_with_exits: each item gets its own answer, whatever the batch and whichever rows leave."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.forward import Exit, Live, Stage, run_with_exits, take_rows
from early_exit.handler.protocol import FULL

N_FEATURES, N_CLASSES = 6, 4


def three_stages(*thresholds: float, shrink_from: int = 1) -> list[Stage]:
    """Return one stage per threshold and a last one, in float64.

    With float64, rounding that depends on the batch cannot move a confidence across its threshold.
    """
    torch.manual_seed(0)
    stages = []
    for threshold in thresholds:
        head = nn.Linear(N_FEATURES, N_CLASSES).double()
        policy = ConfidencePolicy(temperature=0.3, threshold=threshold)
        stages.append(Stage(alone(nn.Sequential(nn.Linear(N_FEATURES, N_FEATURES), nn.Tanh())),
                            Exit(head, policy, lambda logits: logits / 0.3, shrink_from)))
    return [*stages, Stage(alone(nn.Linear(N_FEATURES, N_CLASSES)))]


def alone(module: nn.Module) -> Callable[[Tensor], Live]:
    """Return a module as a stage whose output is one tensor."""
    module = module.double()
    return lambda x: (module(x),)


def inputs(n_rows: int, seed: int = 0) -> Live:
    return (torch.randn(n_rows, N_FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


@settings(max_examples=150)
@given(sizes=st.lists(st.integers(0, 7), max_size=5), seed=st.integers(0, 1000),
       thresholds=st.tuples(st.floats(0.2, 1.1), st.floats(0.2, 1.1)), shadow_rate=st.sampled_from([0.0, 0.3, 1.0]),
       shrink_from=st.integers(1, 9))
@torch.no_grad()
def test_any_split_of_any_batch_gives_the_same_answers(
        sizes: list[int], seed: int, thresholds: tuple[float, float], shadow_rate: float, shrink_from: int) -> None:
    stages, batch = three_stages(*thresholds), inputs(sum(sizes), seed)
    shadow = torch.rand(len(batch[0]), generator=torch.Generator().manual_seed(seed)) < shadow_rate
    together = run_with_exits(batch, three_stages(*thresholds, shrink_from=shrink_from), shadow=shadow)
    apart = [run_with_exits((part,), stages) for part in batch[0].split(sizes)]
    expected = torch.cat([answers.outputs for answers in apart]) if apart else together.outputs
    torch.testing.assert_close(together.outputs, expected)
    assert together.stages.tolist() == [stage for answers in apart for stage in answers.stages.tolist()]


@torch.no_grad()
def test_with_no_exit_taken_the_answers_are_the_backbones() -> None:
    stages, batch = three_stages(1.1, 1.1), inputs(9)
    expected = batch
    for stage in stages:
        expected = stage.forward(*expected)
    answers = run_with_exits(batch, stages)
    assert torch.equal(answers.outputs, expected[0])
    assert answers.stages.tolist() == [FULL] * 9


@torch.no_grad()
def test_when_all_leave_at_the_first_exit_no_later_stage_runs() -> None:
    def never(x: Tensor) -> Live:
        raise AssertionError("a stage after the last row left was run")

    first, *_ = three_stages(0.0, 0.0)
    answers = run_with_exits(inputs(5), [first, Stage(never), Stage(never)])
    assert answers.stages.tolist() == [0] * 5
    assert len(answers.stage_seconds) == 1


@torch.no_grad()
def test_rows_leave_the_batch_only_when_enough_of_them_are_answered() -> None:
    batch = inputs(20)
    seen: list[int] = []

    def watched(stage: Stage) -> Stage:
        return Stage(lambda x: (seen.append(len(x)), stage.forward(x))[1], stage.exit)

    plain = run_with_exits(batch, three_stages(0.6, 0.4))
    n_first, n_second = (int((plain.stages == stage).sum()) for stage in (0, 1))
    assert n_first and n_second and n_first + n_second < 20, "the test needs rows that leave at each exit"
    answers = run_with_exits(batch, [watched(one) for one in three_stages(0.6, 0.4, shrink_from=n_first + n_second)])
    assert seen == [20, 20, 20 - n_first - n_second]
    torch.testing.assert_close(answers.outputs, plain.outputs)
    assert torch.equal(answers.stages, plain.stages)


@torch.no_grad()
def test_an_empty_batch_gives_an_empty_answer_with_all_classes() -> None:
    answers = run_with_exits(inputs(0), three_stages(0.5, 0.5))
    assert answers.outputs.shape == (0, N_CLASSES)


@torch.no_grad()
def test_shadow_rows_are_answered_at_their_exit_and_still_reach_the_end() -> None:
    stages, batch = three_stages(0.6, 0.6), inputs(40)
    shadow = torch.arange(40) % 3 == 0
    plain = run_with_exits(batch, stages)
    shadowed = run_with_exits(batch, stages, shadow=shadow)
    assert (plain.stages[shadow] != FULL).any(), "the test needs shadow rows that exit"
    torch.testing.assert_close(shadowed.outputs, plain.outputs)
    assert torch.equal(shadowed.stages, plain.stages)
    everything = run_with_exits(batch, three_stages(1.1, 1.1))
    torch.testing.assert_close(shadowed.reference, everything.outputs[shadow])


@torch.no_grad()
def test_the_observer_sees_exactly_the_shadow_rows_at_every_cut() -> None:
    stages, batch = three_stages(0.5, 0.5), inputs(20)
    shadow = torch.arange(20) % 4 == 1
    seen: dict[int, Tensor] = {}
    run_with_exits(batch, stages, shadow=shadow, observe=seen.__setitem__)
    expected = (batch[0][shadow],)
    assert seen.keys() == {0, 1}, "the scores are known without it"
    for number, activation in seen.items():
        expected = stages[number].forward(*expected)
        torch.testing.assert_close(activation, expected[0])


def test_selecting_rows_copies_nothing_when_nobody_leaves_and_keeps_the_memory_format() -> None:
    x = torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last)
    assert take_rows(x, torch.arange(4)) is x
    keep = torch.tensor([True, False, True, True])
    kept = take_rows(x, keep.nonzero().flatten())
    assert torch.equal(kept, x[keep])
    assert kept.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_everything_that_travels_loses_the_rows_of_those_who_left() -> None:
    """A second tensor with one number per row must stay aligned with the rows until the last stage."""
    torch.manual_seed(0)
    head, last = nn.Linear(N_FEATURES, N_CLASSES).double(), nn.Linear(N_FEATURES, N_CLASSES).double()
    leaves = Exit(head, ConfidencePolicy(temperature=0.3, threshold=0.6), lambda logits: logits)
    stages = [Stage(lambda x, number: (x.tanh(), number), leaves),
              Stage(lambda x, number: (last(x) + number[:, None],))]
    (x,), number = inputs(30), torch.arange(30).double()
    together = run_with_exits((x, number), stages, shadow=number % 7 == 0)
    assert 0 < (together.stages == FULL).sum() < 30, "the test needs rows that leave and rows that do not"
    apart = [run_with_exits((x[row:row + 1], number[row:row + 1]), stages) for row in range(30)]
    torch.testing.assert_close(together.outputs, torch.cat([one.outputs for one in apart]))
    torch.testing.assert_close(together.reference, (last(x.tanh()) + number[:, None])[number % 7 == 0])
