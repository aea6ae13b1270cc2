"""The decision which stage runs next when rows wait at several; it bounds how long any row waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """The rows that wait at one stage."""

    stage: int
    n_rows: int
    age: int
    """How many stages have been run since the oldest of the rows began."""


def next_stage(waiting: Sequence[Waiting], n_stages: int) -> int:
    """Return the stage to run: where most rows wait, unless somebody has waited for too long.

    The fullest stage brings most rows forward for one step's overhead, and a new request is not held up by the
    few that need the whole backbone. From the age of `n_stages` on, when they would have been answered had they
    been alone, the oldest go first. With at most N rows on their way every row therefore arrives within
    n_stages * (N + 1) steps: from its age of n_stages on each step brings it, or one of the at most N - 1 others
    that are as old or older, a stage further.

    Args:
        waiting: at least one, each stage once.
        n_stages: of the whole backbone.
    """
    patient = all(rows.age < n_stages for rows in waiting)
    return max(waiting, key=lambda rows: (0 if patient else rows.age, rows.n_rows, rows.stage)).stage
