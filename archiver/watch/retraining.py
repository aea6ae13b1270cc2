"""Trains a new plan for a version that serves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.watched import Watched
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.exits.plan import ExitPlan, build_heads, load_plan
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.planning.reassess import cost_on_run


def train_anew(watched: Watched, status: ModelStatus, certify_after: float, run: RunPaths,
               log: Callable[[str], None]) -> tuple[ExitPlan, float | None]:
    """Train a new plan; return it, and the cost of the current one on the same records."""
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        extract(status.archive, layout.root)
        options = replace(watched.options(layout), fresh_after=certify_after)
        train(status.model, layout, list(status.shards), options, run, mar=status.archive, labels=watched.labels,
              log=log)
        current_cost = None
        if layout.plan.exists():
            current, tensors = load_plan(layout.plan)
            heads = build_heads(current, tensors, status.backbone)
            current_cost = cost_on_run(current, heads, run, status.backbone, options)
    return load_plan(run.plan)[0], current_cost
