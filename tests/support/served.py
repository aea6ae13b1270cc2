"""An archive's model in this process, as a worker has it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from early_exit.archiver.source import extract
from early_exit.handler.backbone import Backbone
from early_exit.handler.layout import ArchiveLayout
from early_exit.handler.plan import build_heads, load_plan
from early_exit.handler.served import ServedModel


def served_model(mar: Path, *, sampling_rate: float = 0.0, record_pool: int | None = None) -> ServedModel:
    """Load the model of an early-exit archive."""
    with tempfile.TemporaryDirectory() as scratch:
        layout = ArchiveLayout(Path(scratch))
        extract(mar, layout.root)
        backbone = Backbone.load(layout.folder)
        plan, heads = None, None
        if layout.plan.exists():
            plan, tensors = load_plan(layout.plan)
            heads = build_heads(plan, tensors, backbone.description)
        return ServedModel(backbone, plan, heads, sampling_rate=sampling_rate, record_pool=record_pool)
