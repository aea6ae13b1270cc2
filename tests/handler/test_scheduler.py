"""The order of the stages: no row waits for ever, whichever rows join and leave."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.handler.inference.scheduler import Waiting, next_stage


@settings(max_examples=100)
@given(n_stages=st.integers(1, 6), at_most=st.integers(1, 6), data=st.data())
def test_every_row_arrives_within_the_bound_whatever_the_others_do(
        n_stages: int, at_most: int, data: st.DataObject) -> None:
    """An adversary chooses when rows join and at which stage each of them leaves."""
    step, travelling = 0, []  # [next stage, step at which it joined, last stage]
    for _ in range(40):
        for _ in range(data.draw(st.integers(0, at_most - len(travelling)))):
            travelling.append([0, step, data.draw(st.integers(0, n_stages - 1))])
        if not travelling:
            continue
        stages = {row[0] for row in travelling}
        waiting = [Waiting(stage, sum(row[0] == stage for row in travelling),
                           max(step - row[1] for row in travelling if row[0] == stage)) for stage in stages]
        chosen = next_stage(waiting, n_stages)
        assert chosen in stages
        step += 1
        for row in [row for row in travelling if row[0] == chosen]:
            if row[2] == chosen:
                travelling.remove(row)
            row[0] += 1
        assert all(step - began < n_stages * (at_most + 1) for _, began, _ in travelling)


def test_the_fullest_stage_runs_and_of_two_the_later() -> None:
    assert next_stage([Waiting(0, 2, 1), Waiting(1, 5, 2), Waiting(3, 1, 3)], 4) == 1
    assert next_stage([Waiting(0, 2, 1), Waiting(2, 2, 2)], 4) == 2


def test_whoever_has_waited_as_many_steps_as_there_are_stages_goes_first() -> None:
    assert next_stage([Waiting(0, 7, 1), Waiting(2, 1, 4), Waiting(3, 1, 5)], 4) == 3
