"""The fallback levels of a version: the settings that it can switch to without loading anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.inference.forward import Stage


def fallback_levels(stages: Sequence[Stage], plan: ExitPlan | None) -> tuple[tuple[Stage, ...], ...]:
    """Return the stages at each fallback level: as deployed, with each setting in `plan.safer`, and without exits.

    A version without exits has one level.
    """
    deployed = tuple(stages)
    if plan is None or not plan.exits:
        return (deployed,)
    return (deployed, *(_with_thresholds(deployed, plan, thresholds) for thresholds in plan.safer),
            tuple(replace(stage, exit=None) for stage in deployed))


def _with_thresholds(stages: Sequence[Stage], plan: ExitPlan, thresholds: Sequence[float]) -> tuple[Stage, ...]:
    policies = iter([replace(planned.policy.on_answers(), threshold=threshold)
                     for planned, threshold in zip(plan.exits, thresholds)])
    return tuple(replace(stage, exit=replace(stage.exit, policy=next(policies))) if stage.exit else stage
                 for stage in stages)
