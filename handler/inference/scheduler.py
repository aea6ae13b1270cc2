"""Decides which stage runs next if rows wait at several stages, and bounds how long any row waits."""

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
    """Return the stage to run: the one where most rows wait, unless a row has waited for too long.

    Running the fullest stage advances most rows for the overhead of one step, and a new request is not held up by the
    few that need the whole backbone. From the age of `n_stages` on, at which a row would have been answered had it been
    alone, the oldest rows go first. With at most N rows in flight, every row therefore arrives within
    n_stages * (N + 1) steps: once its age is n_stages, each step advances by one stage either this row, or one of the
    at most N - 1 others that are as old or older.

    Args:
        waiting: the rows that wait, at one stage or more, each stage once.
        n_stages: the number of stages of the whole backbone.
    """
    patient = all(rows.age < n_stages for rows in waiting)
    return max(waiting, key=lambda rows: (0 if patient else rows.age, rows.n_rows, rows.stage)).stage
