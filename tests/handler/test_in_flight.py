"""Running one stage at a time gives the results of a whole pass, whichever calls join and whenever they do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from early_exit.handler.inference.forward import Live, Stage, run_with_exits
from early_exit.handler.inference.in_flight import InFlightCall, InFlightCalls
from tests.handler.test_forward import inputs, three_stages


def run_all(in_flight: InFlightCalls, waited_for: list[InFlightCall], limit: int = 200) -> None:
    ended: list[InFlightCall] = []
    while len(ended) < len(waited_for):
        ended += in_flight.run_stage()
        limit -= 1
        assert limit, "a call never ends"
    assert set(ended) == set(waited_for)


@settings(max_examples=60)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=6),
       seed=st.integers(0, 1000), thresholds=st.tuples(st.floats(0.2, 1.1), st.floats(0.2, 1.1)),
       shadow_rate=st.sampled_from([0.0, 0.3, 1.0]))
@torch.no_grad()
def test_calls_that_join_at_any_time_get_the_answers_of_the_whole_pass(
        sizes: list[tuple[int, int]], seed: int, thresholds: tuple[float, float], shadow_rate: float) -> None:
    """Each call joins some steps after the previous one.

    Its answers, exits, shadow rows, exit predictions and activations are those of an uninterrupted pass.
    """
    stages = three_stages(*thresholds)
    in_flight = InFlightCalls([stages], lambda stage, activation: activation * (stage + 2))
    calls: list[tuple[Live, Tensor, Tensor, InFlightCall]] = []
    ended = []
    for number, (n_rows, pause) in enumerate(sizes):
        batch = inputs(n_rows, seed + number)
        shadow = torch.rand(n_rows, generator=torch.Generator().manual_seed(seed + number)) < shadow_rate
        anytime = torch.rand(n_rows, generator=torch.Generator().manual_seed(seed - number)) < shadow_rate
        calls.append((batch, shadow, anytime, in_flight.enter(batch, shadow, anytime)))
        for _ in range(pause):
            ended += in_flight.run_stage()
    run_all(in_flight, [call for *_, call in calls if call not in ended])
    for batch, shadow, anytime, call in calls:
        seen: dict[int, Tensor] = {}
        expected = run_with_exits(batch, stages, shadow=shadow, anytime=anytime, observe=seen.__setitem__)
        found = call.answers()
        torch.testing.assert_close(found.outputs, expected.outputs)
        assert found.stages.tolist() == expected.stages.tolist()
        assert found.shadow.tolist() == expected.shadow.tolist()
        torch.testing.assert_close(found.reference, expected.reference)
        assert found.anytime.tolist() == expected.anytime.tolist()
        assert found.exit_scores.keys() == expected.exit_scores.keys()
        for stage, scores in expected.exit_scores.items():
            torch.testing.assert_close(found.exit_scores[stage], scores)
        activations = call.activations()
        assert activations.keys() == seen.keys()
        for stage, activation in activations.items():
            torch.testing.assert_close(activation, seen[stage] * (stage + 2))
        assert 1 <= len(found.stage_seconds) <= len(stages)


@torch.no_grad()
def test_rows_of_different_ages_run_together() -> None:
    sizes: list[int] = []

    def counted(x: Tensor) -> Live:
        sizes.append(len(x))
        return (x,)

    in_flight = InFlightCalls([[Stage(lambda x: (x,)), Stage(counted)]])
    first = in_flight.enter(inputs(1), torch.zeros(1, dtype=torch.bool))
    assert in_flight.run_stage() == []
    second = in_flight.enter(inputs(2), torch.zeros(2, dtype=torch.bool))
    assert in_flight.run_stage() == [] and not sizes, "two wait at the first stage and one at the second"
    assert in_flight.run_stage() == [first, second]
    assert sizes == [3]


@torch.no_grad()
def test_a_row_that_makes_a_stage_fail_fails_alone() -> None:
    def picky(x: Tensor) -> Live:
        if (x > 100).any():
            raise RuntimeError("too large")
        return (x,)

    in_flight = InFlightCalls([[Stage(lambda x: (x,)), Stage(picky)]])
    none = torch.zeros(1, dtype=torch.bool)
    good, bad, other = (in_flight.enter(batch, none) for batch in (inputs(1), (inputs(1)[0] + 1000,), inputs(1, 2)))
    run_all(in_flight, [good, bad, other])
    torch.testing.assert_close(good.answers().outputs, inputs(1)[0])
    torch.testing.assert_close(other.answers().outputs, inputs(1, 2)[0])
    with pytest.raises(RuntimeError, match="too large"):
        bad.answers()


@torch.no_grad()
def test_a_dropped_call_leaves_the_others_alone() -> None:
    in_flight = InFlightCalls([three_stages(1.1, 1.1)])
    shadow = torch.zeros(2, dtype=torch.bool)
    gone, stays = in_flight.enter(inputs(2, 1), shadow), in_flight.enter(inputs(2, 2), shadow)
    in_flight.run_stage()
    in_flight.drop(gone)
    run_all(in_flight, [stays])
    torch.testing.assert_close(stays.answers().outputs, run_with_exits(inputs(2, 2), three_stages(1.1, 1.1)).outputs)
    assert in_flight.run_stage() == []


def test_with_nobody_on_the_way_a_step_does_nothing() -> None:
    assert InFlightCalls([three_stages(0.5)]).run_stage() == []


@torch.no_grad()
def test_a_call_keeps_the_setting_that_it_began_with() -> None:
    eager, never = three_stages(0.0, 0.0), three_stages(1.1, 1.1)
    in_flight = InFlightCalls([eager, never])
    shadow = torch.zeros(2, dtype=torch.bool)
    before, after = in_flight.enter(inputs(2, 1), shadow), in_flight.enter(inputs(2, 2), shadow, level=1)
    run_all(in_flight, [before, after])
    assert before.answers().stages.tolist() == [0, 0]
    torch.testing.assert_close(after.answers().outputs, run_with_exits(inputs(2, 2), never).outputs)
