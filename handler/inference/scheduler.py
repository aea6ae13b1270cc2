"""The choice of the stage that runs next if rows wait at several stages, with a bound on how long any row waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """The rows that wait at one stage."""

    stage: int
    n_rows: int
    age: int
    """The number of stages that have been run since the oldest of the rows began."""


def next_stage(waiting: Sequence[Waiting], n_stages: int) -> int:
    """Return the stage to run: the stage where most rows wait, unless a row has waited for too long.

    If the fullest stage runs, most rows advance for the overhead of one step, and the few requests that need the whole
    backbone do not delay new ones. A row that is alone is answered at the age `n_stages` at the latest. If a row has
    reached this age, the oldest rows go first. With at most N rows in flight, every row therefore arrives within
    n_stages * (N + 1) steps: once its age is n_stages, each step advances by one stage either this row, or one of the
    other rows that are as old or older, of which there are at most N - 1.

    Args:
        waiting: the rows that wait, at one stage or more, each stage once.
        n_stages: the number of stages of the whole backbone.
    """
    patient = all(rows.age < n_stages for rows in waiting)
    return max(waiting, key=lambda rows: (0 if patient else rows.age, rows.n_rows, rows.stage)).stage
